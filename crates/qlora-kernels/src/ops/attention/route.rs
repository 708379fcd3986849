//! The choice of the attention path for a batch on a GPU, and the sizes for which cuDNN's plans are made.
//!
//! There are three paths: our own kernels, which take every batch; cuDNN for sequences of one length; and cuDNN for sequences
//! of any lengths, one behind the other ("packed", "THD"). The choice depends on the batch's lengths alone, so that forward and
//! backward of every layer of a batch make the same.
//!
//! Making the plans of a shape takes about 0.1 s, so a run over documents of ever new lengths must come by with few shapes:
//!
//! - packed plans are made for [`Bounds`]: room for so many sequences of at most such a length. The sequences themselves are
//!   read from device memory at every call. A batch takes bounds that are there already wherever it fits ([`KnownBounds`]);
//! - a length gets plans of its own only if batches of that shape follow each other, or were announced ([`Admission`]).

use crate::sequence::SequenceLayout;

/// Sequences of one length are left to our own kernels below so many tokens. Measured on an H200 with 32/8 heads of 128
/// (`benches/attention_paths.rs`): at 512 cuDNN takes 5% less time, at 2,048 a quarter.
pub(crate) const UNIFORM_FROM: f64 = 512.0;

/// Packed batches are left to our own kernels below so many tokens of a typical sequence ([`BatchFacts::typical_len`]), if the
/// batch is large: cuDNN takes 7 to 20% less time from 340 on in batches of 3,000 to 8,000 tokens.
pub(crate) const PACKED_FROM: f64 = 320.0;
const PACKED_LARGE: usize = 2048;

/// The same for smaller batches: its packed kernels are the slower ones for a document of 700 or 1,024 tokens alone, and the
/// faster ones (by a sixth) for one of 1,111.
const PACKED_ALONE_FROM: f64 = 1088.0;

/// The most rows that [`Bounds`] may have, by the tokens of the largest batch. cuDNN's backward wants memory for every row of
/// the bounds; a batch of a long sequence and many short ones would want far more of them than it has tokens.
pub(crate) const ROWS_PER_TOKEN: f64 = 3.0;

/// So many rows are always allowed.
const FEW_ROWS: usize = 2048;

/// The number of bounds and of uniform shapes that are remembered; fewer than plans are kept, so that none is made in
/// turns.
const MOST_SHAPES: usize = 12;

/// An implementation of attention on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AttentionPath {
    /// Our own kernels.
    Own,
    /// cuDNN, for sequences of one length.
    CudnnUniform,
    /// cuDNN, for sequences of any lengths one behind the other.
    CudnnPacked,
}

/// The properties of a batch that determine the choice of an attention path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct BatchFacts {
    pub(crate) sequences: usize,
    pub(crate) tokens: usize,
    pub(crate) longest: usize,
    /// Whether all sequences have the length of the longest.
    pub(crate) uniform: bool,
    /// The length of the sequence that a token is in, on average: work grows with it, per token. Long sequences count for
    /// more than in the plain mean, as they do in the time taken.
    pub(crate) typical_len: f64,
}

impl BatchFacts {
    pub(crate) fn of(layout: &SequenceLayout) -> Self {
        let tokens = layout.tokens();
        let squares: f64 = layout.sequences().map(|rows| (rows.len() as f64).powi(2)).sum();
        Self {
            sequences: layout.sequences().len(),
            tokens,
            longest: layout.max_len(),
            uniform: layout.uniform_len().is_some(),
            typical_len: squares / (tokens.max(1)) as f64,
        }
    }
}

/// The paths that can take a batch; our own kernels always can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offers {
    pub(crate) uniform: bool,
    pub(crate) packed: bool,
}

/// The path for a batch: the one that was asked for if it is offered, else our own; the fastest if none was asked for.
pub(crate) fn choose(facts: &BatchFacts, offers: Offers, asked: Option<AttentionPath>) -> AttentionPath {
    let uniform = offers.uniform && facts.uniform;
    match asked {
        Some(AttentionPath::CudnnUniform) if uniform => AttentionPath::CudnnUniform,
        Some(AttentionPath::CudnnPacked) if offers.packed => AttentionPath::CudnnPacked,
        Some(_) => AttentionPath::Own,
        None if uniform && facts.longest as f64 >= UNIFORM_FROM => AttentionPath::CudnnUniform,
        None if offers.packed && facts.typical_len >= packed_from(facts.tokens) => AttentionPath::CudnnPacked,
        None => AttentionPath::Own,
    }
}

/// The typical length from which on a batch of so many tokens goes to cuDNN's packed kernels.
fn packed_from(tokens: usize) -> f64 {
    if tokens >= PACKED_LARGE { PACKED_FROM } else { PACKED_ALONE_FROM }
}

/// Room for sequences: the sizes for which a packed plan is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Bounds {
    pub(crate) sequences: usize,
    pub(crate) len: usize,
}

impl Bounds {
    /// The smallest bounds on the grid that hold so many sequences of at most such a length. Coarser grids cost memory, finer
    /// ones plans.
    pub(crate) fn around(sequences: usize, longest: usize) -> Self {
        let up = |value: usize, least: usize, steps: usize| {
            let value = value.max(least);
            value.next_multiple_of((value.next_power_of_two() / steps).max(least))
        };
        // Lengths go by tiles of 128.
        Self { sequences: up(sequences, 1, 8), len: up(longest, 128, 4) }
    }

    /// Bounds for a batch and others like it. Where there are many sequences, bins were filled and their number varies from
    /// batch to batch: there is room for half as many again, as far as `most` rows allow.
    fn with_room(facts: &BatchFacts, most: usize) -> Self {
        let bounds = Self::around(facts.sequences, facts.longest);
        if facts.sequences <= 8 {
            return bounds;
        }
        let roomy = Self::around(facts.sequences + facts.sequences / 2, facts.longest).sequences;
        Self { sequences: roomy.min(most / bounds.len).max(facts.sequences), ..bounds }
    }

    /// Rows of all the room.
    pub(crate) fn rows(self) -> usize {
        self.sequences * self.len
    }

    fn hold(self, facts: &BatchFacts) -> bool {
        self.sequences >= facts.sequences && self.len >= facts.longest
    }
}

/// The bounds that were used so far.
#[derive(Debug, Default)]
pub(crate) struct KnownBounds {
    known: Vec<Bounds>,
    /// Tokens of the largest batch so far, or that was announced.
    largest: usize,
}

impl KnownBounds {
    /// Makes room for batches of so many tokens before they come.
    pub(crate) fn expect(&mut self, tokens: usize) {
        self.largest = self.largest.max(tokens);
    }

    /// The most rows that bounds may have.
    pub(crate) fn most_rows(&self) -> usize {
        most_rows(self.largest)
    }

    /// Bounds for a batch: the smallest known ones that hold it, else new ones; none if they would be too large.
    pub(crate) fn pick(&mut self, facts: &BatchFacts) -> Option<Bounds> {
        self.expect(facts.tokens);
        let most = self.most_rows();
        let fitting = self.known.iter().enumerate().filter(|(_, bounds)| bounds.hold(facts) && bounds.rows() <= most);
        if let Some((index, _)) = fitting.min_by_key(|(_, bounds)| bounds.rows()) {
            // The one used last is at the end.
            let bounds = self.known.remove(index);
            self.known.push(bounds);
            return Some(bounds);
        }
        let bounds = Bounds::with_room(facts, most);
        if bounds.rows() > most {
            return None;
        }
        if self.known.len() >= MOST_SHAPES {
            self.known.remove(0);
        }
        self.known.push(bounds);
        Some(bounds)
    }
}

/// The most rows that bounds may have where the largest batch has so many tokens.
pub(crate) fn most_rows(tokens: usize) -> usize {
    ((tokens as f64 * ROWS_PER_TOKEN) as usize).max(FEW_ROWS)
}

/// The shapes of one length that get plans of their own.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    /// `[sequences, length]`, the one used last at the end.
    admitted: Vec<[usize; 2]>,
    last: Option<[usize; 2]>,
}

impl Admission {
    /// A shape that batches are going to have.
    pub(crate) fn announce(&mut self, shape: [usize; 2]) {
        self.admitted.retain(|known| *known != shape);
        if self.admitted.len() >= MOST_SHAPES {
            self.admitted.remove(0);
        }
        self.admitted.push(shape);
    }

    /// Whether a batch of this shape, the next one, gets plans of its own: after an announcement, or from the second in a row
    /// on. The very first batch does too if its length looks chosen and not met by chance.
    pub(crate) fn admits(&mut self, shape: [usize; 2]) -> bool {
        let first = self.last.is_none() && self.admitted.is_empty() && shape[1].is_multiple_of(128);
        let again = self.last.replace(shape) == Some(shape);
        let admitted = first || again || self.admitted.contains(&shape);
        if admitted {
            self.announce(shape);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const ALL: Offers = Offers { uniform: true, packed: true };

    fn facts(lengths: &[usize]) -> BatchFacts {
        BatchFacts::of(&SequenceLayout::from_lengths(lengths))
    }

    /// xorshift64.
    fn random(state: &mut u64, range: std::ops::Range<usize>) -> usize {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        range.start + (*state >> 11) as usize % range.len()
    }

    #[test]
    fn the_path_follows_from_the_lengths() {
        use AttentionPath::{CudnnPacked, CudnnUniform, Own};
        let automatic = |lengths: &[usize], offers| choose(&facts(lengths), offers, None);
        let (no_packed, nothing) = (Offers { packed: false, ..ALL }, Offers { uniform: false, packed: false });
        for (lengths, with_all, without_packed) in [
            (&[2048; 4][..], CudnnUniform, CudnnUniform),
            (&[512; 8][..], CudnnUniform, CudnnUniform),
            (&[511][..], Own, Own),
            (&[768, 767, 766][..], CudnnPacked, Own),
            (&[300; 8][..], Own, Own),
            (&[1, 17][..], Own, Own),
            (&[2000, 48][..], CudnnPacked, Own),
            // Many short ones beside a long one: most of the work is the long one's.
            (&[1500, 100, 100, 100, 100][..], CudnnPacked, Own),
            (&[600, 300, 300, 300, 300, 248][..], CudnnPacked, Own),
            (&[600, 300, 300, 248][..], Own, Own),
        ] {
            assert_eq!(automatic(lengths, ALL), with_all, "{lengths:?}");
            assert_eq!(automatic(lengths, no_packed), without_packed, "{lengths:?}");
            assert_eq!(automatic(lengths, nothing), Own, "{lengths:?}");
        }
        // A length without plans of its own goes the packed way.
        assert_eq!(automatic(&[1337], Offers { uniform: false, ..ALL }), CudnnPacked);
        // A path that is asked for comes before the fastest one, if it is available.
        let asked = |path| choose(&facts(&[5, 5]), ALL, Some(path));
        assert_eq!([Own, CudnnUniform, CudnnPacked].map(asked), [Own, CudnnUniform, CudnnPacked]);
        assert_eq!(choose(&facts(&[5, 6]), ALL, Some(CudnnUniform)), Own);
        assert_eq!(choose(&facts(&[5, 6]), no_packed, Some(CudnnPacked)), Own);
    }

    #[test]
    fn tokens_of_long_sequences_count_for_more() {
        assert_eq!(facts(&[100, 300]).typical_len, 250.0);
        assert_eq!(facts(&[7, 7, 7]).typical_len, 7.0);
        assert_eq!(facts(&[]).typical_len, 0.0);
    }

    #[test]
    fn bounds_lie_on_a_grid() {
        let len = |longest| Bounds::around(1, longest).len;
        let lengths = [1, 128, 129, 512, 513, 1000, 1024, 1025, 1537, 2048, 2049];
        assert_eq!(lengths.map(len), [128, 128, 256, 512, 768, 1024, 1024, 1536, 2048, 2048, 3072]);
        let sequences: Vec<usize> = (1..=18).map(|count| Bounds::around(count, 128).sequences).collect();
        assert_eq!(sequences, [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20, 20]);
        for sequences in 1..200 {
            for longest in (1..5000).step_by(37) {
                let bounds = Bounds::around(sequences, longest);
                assert!(bounds.sequences >= sequences && bounds.len >= longest);
                assert!(bounds.sequences * 2 < 3 * sequences + 2 && bounds.len * 2 < 3 * longest + 256);
                assert_eq!(Bounds::around(bounds.sequences, bounds.len), bounds);
            }
        }
    }

    #[test]
    fn a_batch_takes_known_bounds_where_it_fits() {
        let mut known = KnownBounds::default();
        known.expect(8192);
        let mut pick =
            |lengths: &[usize]| known.pick(&facts(lengths)).map(|Bounds { sequences, len }| [sequences, len]);
        assert_eq!(pick(&[500; 15]), Some([24, 512]));
        assert_eq!(pick(&[500; 9]), Some([24, 512]));
        assert_eq!(pick(&[900, 500, 40]), Some([3, 1024]));
        assert_eq!(pick(&[900; 9]), Some([14, 1024]));
        assert_eq!(pick(&[700; 4]), Some([14, 1024]));
        assert_eq!(pick(&[700; 2]), Some([3, 1024]));
        assert_eq!(pick(&[600; 16]), Some([24, 768]));
        // The largest batch had 9,600 tokens: 28,800 rows. 29 sequences of at most 1,024 would be more.
        let mut lengths = [100; 29];
        lengths[3] = 1000;
        assert_eq!(pick(&lengths), None);
    }

    /// Documents of 25 to 1,000 tokens, eight a batch, and bins of 2,048 with several documents each, four a batch: after
    /// fifty batches no other bounds come up, and there are few.
    #[test]
    fn few_bounds_serve_a_run_over_documents_of_any_length() {
        for (name, most) in [("documents", 3), ("bins", 6), ("long documents", 5)] {
            let (mut known, mut state) = (KnownBounds::default(), 0x9e37_79b9_7f4a_7c15);
            known.expect(if name == "documents" { 8000 } else { 8192 });
            let (mut early, mut late) = (HashSet::new(), HashSet::new());
            let mut own = 0;
            for step in 0..500 {
                let lengths: Vec<usize> = match name {
                    "documents" => (0..8).map(|_| random(&mut state, 25..1001)).collect(),
                    "long documents" => vec![random(&mut state, 1024..2049)],
                    _ => {
                        let (mut lengths, mut bin, mut room) = (Vec::new(), 0, 2048);
                        while bin < 4 {
                            let len = random(&mut state, 20..701) + random(&mut state, 5..301);
                            if len > room {
                                (bin, room) = (bin + 1, 2048);
                                continue;
                            }
                            room -= len;
                            lengths.push(len);
                        }
                        lengths
                    }
                };
                match known.pick(&facts(&lengths)) {
                    Some(bounds) if step < 50 => drop(early.insert(bounds)),
                    Some(bounds) => drop(late.insert(bounds)),
                    None => own += 1,
                }
            }
            assert!(late.is_subset(&early), "{name}: {early:?}, then {late:?}");
            assert!(early.len() <= most && own < 25, "{name}: {early:?}, {own} batches without");
        }
    }

    #[test]
    fn a_length_met_by_chance_gets_no_plans_of_its_own() {
        let mut admission = Admission::default();
        // The first batch of a run of full bins.
        assert!(admission.admits([4, 2048]) && admission.admits([4, 2048]));
        assert!(!admission.admits([1, 1337]) && !admission.admits([1, 1338]));
        assert!(admission.admits([1, 1338]));
        assert!(admission.admits([4, 2048]));
        let mut admission = Admission::default();
        assert!(!admission.admits([1, 1111]));
        admission.announce([2, 1500]);
        assert!(admission.admits([2, 1500]) && !admission.admits([1, 1024]));
        // Those used last are remembered, and not without end.
        for len in 0..100 {
            admission.announce([1, len]);
            assert!(admission.admits([2, 1500]));
        }
        assert!(admission.admitted.len() <= MOST_SHAPES);
    }
}
