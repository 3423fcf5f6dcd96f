//! Which instructions the kernels may use.

/// An instruction set that kernels are written for. Which one this machine has is found out at run time: a VMM is built once,
/// for every x86-64.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Isa {
    /// What every machine has.
    Portable,
    /// AVX2, with the instructions over single bits that came with it.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2, and AVX-512 with VBMI2, which keeps the bytes that a mask has, and VPOPCNTDQ, which counts bits.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Whether the machine has all of these features.
#[cfg(target_arch = "x86_64")]
macro_rules! has {
    ($($feature:tt),*) => { $(is_x86_feature_detected!($feature))&&* };
}

impl Isa {
    /// All there are, the best one first.
    #[cfg(target_arch = "x86_64")]
    const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Portable];
    #[cfg(not(target_arch = "x86_64"))]
    const ALL: [Self; 1] = [Self::Portable];

    /// Whether this machine has it. Cheap: the standard library remembers what it found.
    fn is_here(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => has!("avx2", "bmi1", "bmi2", "popcnt"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_here()
                    && has!(
                        "avx512f",
                        "avx512bw",
                        "avx512vl",
                        "avx512vbmi2",
                        "avx512vpopcntdq"
                    )
            }
        }
    }

    /// The best that this machine has.
    pub(crate) fn best() -> Self {
        let mut all = Self::ALL.into_iter();
        all.find(|isa| isa.is_here()).unwrap_or(Self::Portable)
    }

    /// All that this machine has: tests hold each of them to the same oracle, and say which they could not.
    #[cfg(test)]
    pub(crate) fn here() -> Vec<Self> {
        use std::io::Write;
        static SAID: std::sync::Once = std::sync::Once::new();
        let (here, missing): (Vec<_>, Vec<_>) =
            Self::ALL.into_iter().partition(|isa| isa.is_here());
        SAID.call_once(|| {
            for isa in missing {
                // Past what the test harness keeps to itself.
                let _ = writeln!(
                    std::io::stderr(),
                    "skipped: {isa:?} kernels: not on this machine"
                );
            }
        });
        here
    }
}
