//! Seeds and shuffles that are the same on every machine and with every version of every dependency.
//!
//! The generator is SplitMix64 (Steele, Lea, Flood 2014): `state += golden; z = mix(state)`. What a seed gives is part of
//! the checkpoint format, so it is defined here and not by a dependency's choice of algorithm.

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The state of the generator: `new(state)` gives the numbers that would have followed.
    pub(crate) fn state(&self) -> u64 {
        self.state
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A uniform number below `bound`, without bias (Lemire 2019: multiply, reject the short first interval).
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        debug_assert!(bound > 0);
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            let (high, low) = ((product >> 64) as u64, product as u64);
            if low >= bound || low >= bound.wrapping_neg() % bound {
                return high;
            }
        }
    }
}

/// The finalizer of SplitMix64: a bijection in which every input bit reaches every output bit.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A seed for one purpose out of the run's seed and the coordinates of the purpose (epoch; step and micro-batch).
pub(crate) fn derive_seed(seed: u64, coordinates: &[u64]) -> u64 {
    coordinates.iter().fold(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)), |hash, &x| {
        mix((hash ^ mix(x)).wrapping_add(0x9e37_79b9_7f4a_7c15))
    })
}

/// A permutation of `0..len` (Fisher-Yates).
pub(crate) fn permutation(len: usize, seed: u64) -> Vec<usize> {
    let mut rng = SplitMix64::new(seed);
    let mut order: Vec<usize> = (0..len).collect();
    for i in (1..len).rev() {
        order.swap(i, rng.below(i as u64 + 1) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_sequence() {
        // First outputs of the reference implementation for seed 1234567.
        let mut rng = SplitMix64::new(1_234_567);
        let first = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([rng.next_u64(), rng.next_u64(), rng.next_u64()], first);
    }

    #[test]
    fn permutations_are_fixed_complete_and_even() {
        assert_eq!(permutation(8, 42), permutation(8, 42));
        assert_ne!(permutation(8, 42), permutation(8, 43));
        let mut counts = [[0; 4]; 4];
        for seed in 0..4000 {
            let order = permutation(4, derive_seed(seed, &[0]));
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3]);
            order.iter().enumerate().for_each(|(place, &item)| counts[place][item] += 1);
        }
        // Expectation 1000, standard deviation 27.
        assert!(counts.as_flattened().iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    #[test]
    fn the_shuffle_never_changes() {
        // A checkpoint written by one version must resume in the next.
        assert_eq!(permutation(10, derive_seed(42, &[0])), [5, 1, 9, 6, 7, 2, 4, 0, 8, 3]);
        assert_ne!(derive_seed(42, &[0, 1]), derive_seed(42, &[1, 0]));
        assert_ne!(derive_seed(42, &[]), derive_seed(42, &[0]));
    }
}
