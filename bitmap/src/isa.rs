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
}

impl Isa {
    /// The best that this machine has. Cheap: the standard library remembers what it found.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt")
        {
            return Self::Avx2;
        }
        Self::Portable
    }

    /// All that this machine has: tests hold each of them to the same oracle.
    #[cfg(test)]
    pub(crate) fn here() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        if Self::best() != Self::Portable {
            all.push(Self::best());
        }
        all
    }
}
