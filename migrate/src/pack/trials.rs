//! When it is worth trying to compress.

/// Tries in vain before trying becomes rare.
const PATIENCE: u32 = 4;
/// Of so many blocks, one is tried then, and of that only a sample at first.
const RARELY: u32 = 16;

/// How trying to compress went of late, on one connection. Contents that do not shrink come in stretches, and trying costs
/// more than sending.
#[derive(Default)]
pub(super) struct Trials {
    in_vain: u32,
    blocks: u32,
}

/// How a block is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Trial {
    /// All of it.
    Whole,
    /// All of it if a few of its pages shrink.
    Sample,
    /// Not at all.
    None,
}

impl Trials {
    pub(super) const fn next(&mut self) -> Trial {
        if self.in_vain < PATIENCE {
            return Trial::Whole;
        }
        self.blocks = (self.blocks + 1) % RARELY;
        if self.blocks == 0 {
            Trial::Sample
        } else {
            Trial::None
        }
    }

    /// How a trial went.
    pub(super) const fn went(&mut self, shrunk: bool) {
        self.in_vain = if shrunk {
            0
        } else {
            self.in_vain.saturating_add(1)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trying_in_vain_becomes_rare_and_success_ends_that() {
        let mut trials = Trials::default();
        for _ in 0..PATIENCE {
            assert_eq!(trials.next(), Trial::Whole);
            trials.went(false);
        }
        let mut tried = 0;
        for _ in 0..10 * RARELY {
            match trials.next() {
                Trial::None => {}
                Trial::Sample => {
                    trials.went(false);
                    tried += 1;
                }
                Trial::Whole => panic!("it has not become rare"),
            }
        }
        assert_eq!(tried, 10);
        trials.went(true);
        assert_eq!(trials.next(), Trial::Whole);
    }
}
