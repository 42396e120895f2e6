//! Which rows of dQ and dK are judged: all, or, of a step too large for that, some that are chosen to tell.

use super::explain::TILES;
use super::step::Step;
use fused_xent_kernels::problem::{Label, Problem, Sample, Shape};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroUsize;

/// How many rows of dQ and dK are judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sampling {
    /// All; of a step that is too large for it, [`ROWS`] of each.
    #[default]
    BySize,
    /// All.
    Full,
    /// So many of dQ in each microbatch, and of dK.
    Rows(NonZeroUsize),
}

/// Rows of a sample unless another number is asked for.
pub const ROWS: NonZeroUsize = NonZeroUsize::new(256).expect("it is not 0");
/// Floating-point operations of one product Q·Kᵀ, over all microbatches, above which a step is sampled.
const MOST_WORK: f64 = 1e12;
/// Bytes taken to be free where the system does not say.
const MEMORY: u64 = 8 << 30;

impl Sampling {
    /// How many rows are sampled, and if that was not asked for, why; `None` if all are judged.
    pub(super) fn rows(self, step: &Step, judged: &[usize]) -> Option<(NonZeroUsize, Option<String>)> {
        let shapes = judged.iter().map(|&m| step.microbatches[m].problem.shape());
        match self {
            Sampling::Full => None,
            Sampling::Rows(rows) => Some((rows, None)),
            Sampling::BySize => too_large(shapes, available_memory().unwrap_or(MEMORY)).map(|why| (ROWS, Some(why))),
        }
    }
}

/// Why microbatches of these shapes are too many for a full replay with so many bytes of free memory; `None` if they are not.
fn too_large(shapes: impl Iterator<Item = Shape>, available: u64) -> Option<String> {
    // Two parts of the reference's dQ and dK; those recorded; a kernel's, and their two parts.
    const COPIES: f64 = 2.0 + 1.0 + 3.0;
    let (mut bytes, mut work) = (0.0, 0.0);
    for Shape { tokens, hidden, vocab } in shapes {
        let (n, d, v) = (tokens as f64, hidden as f64, vocab as f64);
        bytes += COPIES * (n + v) * d * size_of::<f64>() as f64;
        work += 2.0 * n * d * v;
    }
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    if bytes > available as f64 / 2.0 {
        let (needed, half) = (gib(bytes), gib(available as f64 / 2.0));
        return Some(format!("its float64 gradients take {needed:.1} GiB, more than {half:.1} GiB, half of the free memory"));
    }
    (work > MOST_WORK)
        .then(|| format!("each product of the replay takes {work:.1e} floating-point operations, more than {MOST_WORK:.0e}"))
}

/// Bytes that may be used without swapping, as Linux and a control group say it.
fn available_memory() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let free = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)?;
    let group = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/memory.{name}")).ok()?.trim().parse::<u64>().ok();
    let of_group = group("max").zip(group("current")).map(|(most, used)| most.saturating_sub(used));
    Some(of_group.map_or(free, |of_group| of_group.min(free)))
}

/// The sample of each judged microbatch: `rows` tokens of its own, and the same `rows` vocab ids in all, since dK accumulates.
///
/// The rule is the same for every run on the same step. It takes in where faults of tiling and masking show, and spreads
/// the rest evenly, at random places.
pub(super) fn choose(rows: NonZeroUsize, step: &Step, judged: &[usize], number: u64) -> Vec<Sample> {
    let problems: Vec<&Problem> = judged.iter().map(|&m| &step.microbatches[m].problem).collect();
    let Some(vocab) = problems.iter().map(|p| p.shape().vocab).min() else { return vec![] };
    let ids = vocab_ids(rows.get(), vocab, &problems, number);
    let sample = |(m, problem): (&usize, &&Problem)| {
        let seed = number ^ (*m as u64 + 1).rotate_left(32);
        Sample::new(problem.shape(), tokens(rows.get(), problem, seed), ids.clone()).expect("rows within the shape")
    };
    judged.iter().zip(&problems).map(sample).collect()
}

fn vocab_ids(rows: usize, vocab: usize, problems: &[&Problem], seed: u64) -> Vec<usize> {
    let mut hits = vec![0usize; vocab];
    for label in problems.iter().flat_map(|p| p.labels()).filter_map(|label| label.column()) {
        if let Some(hits) = hits.get_mut(label) {
            *hits += 1;
        }
    }
    let mut most_hit: Vec<usize> = (0..vocab).filter(|&id| hits[id] > 0).collect();
    most_hit.sort_by_key(|&id| (std::cmp::Reverse(hits[id]), id));
    let valid = problems.iter().map(|p| p.valid_columns()).min().unwrap_or(vocab);
    let mut picked = Picked::new(rows, vocab, seed);
    picked.add([0, vocab - 1, valid - 1, valid], rows);
    picked.add(most_hit.iter().copied(), rows / 4);
    picked.add(most_hit.iter().copied().filter(|id| id % TILES[0] == 0), rows / 8);
    picked.add_spread((0..vocab).filter(|&id| hits[id] == 0).collect(), rows / 8);
    picked.add(borders(vocab).chain(borders(valid)), rows / 8);
    picked.fill()
}

fn tokens(rows: usize, problem: &Problem, seed: u64) -> Vec<usize> {
    let tokens = problem.shape().tokens;
    let mut picked = Picked::new(rows, tokens, seed);
    picked.add([0, tokens.saturating_sub(1)], rows);
    picked.add_spread((0..tokens).filter(|&n| problem.labels()[n] == Label::Masked).collect(), rows / 8);
    picked.add(borders(tokens), rows / 8);
    picked.fill()
}

/// The rows on both sides of where tiles of the usual sizes meet: of the last border, then of the one in the middle.
fn borders(of: usize) -> impl Iterator<Item = usize> {
    let ends = |share: usize| TILES.into_iter().rev().map(move |tile| of / share / tile * tile);
    ends(1).chain(ends(2)).filter(|&end| end > 0).flat_map(|end| [end - 1, end])
}

/// Rows picked so far.
struct Picked {
    wanted: usize,
    of: usize,
    rows: BTreeSet<usize>,
    random: Pcg64,
}

impl Picked {
    /// None yet of `wanted` among `of` (or all of them).
    fn new(wanted: usize, of: usize, seed: u64) -> Self {
        Self { wanted: wanted.min(of), of, rows: BTreeSet::new(), random: Pcg64::seed_from_u64(seed) }
    }

    /// Picks the first `most` of `rows` that are new.
    fn add(&mut self, rows: impl IntoIterator<Item = usize>, most: usize) {
        let end = (self.rows.len() + most).min(self.wanted);
        for row in rows {
            if self.rows.len() >= end {
                return;
            }
            if row < self.of {
                self.rows.insert(row);
            }
        }
    }

    /// Picks up to `most` of `rows`: a random one of each of as many equal pieces.
    fn add_spread(&mut self, rows: Vec<usize>, most: usize) {
        let pieces = most.min(rows.len());
        let random = &mut self.random;
        let places: Vec<usize> =
            (0..pieces).map(|i| random.random_range(i * rows.len() / pieces..(i + 1) * rows.len() / pieces)).collect();
        self.add(places.into_iter().map(|place| rows[place]), most);
    }

    /// Spreads the rest over the rows that are left.
    fn fill(mut self) -> Vec<usize> {
        let left: Vec<usize> = (0..self.of).filter(|row| !self.rows.contains(row)).collect();
        let missing = self.wanted - self.rows.len();
        self.add_spread(left, missing);
        self.rows.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fused_xent_kernels::problem::{Inputs, Layout, LossOptions};

    const SHAPE: Shape = Shape { tokens: 600, hidden: 1, vocab: 5000 };
    const VALID: usize = 4900;
    const MASKED: usize = 77;
    const MOST_HIT: usize = 1234;

    /// One token is masked, a tenth have the same label, and ids from 2500 on have none.
    fn with_problem<R>(f: impl FnOnce(&Problem) -> R) -> R {
        let (hidden, unembedding) = (vec![0.0f32; SHAPE.tokens], vec![0.0f32; SHAPE.vocab]);
        let label = |n: usize| match n {
            MASKED => -100,
            n if n % 10 == 0 => MOST_HIT as i32,
            n => (n * 37 % 2500) as i32,
        };
        let targets: Vec<i32> = (0..SHAPE.tokens).map(label).collect();
        let inputs = Inputs {
            hidden: hidden[..].into(),
            unembedding: unembedding[..].into(),
            layout: Layout::Vd,
            targets: targets[..].into(),
            token_weights: None,
            shape: SHAPE,
            shard: None,
        };
        f(&Problem::new(inputs, LossOptions { valid_vocab: Some(VALID), ..LossOptions::default() }).unwrap())
    }

    fn sorted_and_distinct(rows: &[usize], of: usize) -> bool {
        rows.windows(2).all(|w| w[0] < w[1]) && rows.last().is_some_and(|&row| row < of)
    }

    #[test]
    fn as_many_rows_as_wanted_and_those_that_tell() {
        with_problem(|problem| {
            for wanted in [1, 2, 5, 40, 256, 4999, 5000, 9000] {
                let (ids, tokens) = (vocab_ids(wanted, SHAPE.vocab, &[problem], 3), tokens(wanted, problem, 3));
                assert_eq!((ids.len(), tokens.len()), (wanted.min(SHAPE.vocab), wanted.min(SHAPE.tokens)));
                assert!(sorted_and_distinct(&ids, SHAPE.vocab) && sorted_and_distinct(&tokens, SHAPE.tokens));
            }
            let (ids, tokens) = (vocab_ids(64, SHAPE.vocab, &[problem], 3), tokens(64, problem, 3));
            for id in [0, SHAPE.vocab - 1, VALID - 1, VALID, MOST_HIT, 4095, 4096] {
                assert!(ids.contains(&id), "{id}: {ids:?}");
            }
            assert!(ids.iter().filter(|&&id| id > 2500 && id < VALID).count() >= 8, "ids that are no label: {ids:?}");
            for token in [0, SHAPE.tokens - 1, MASKED, 511, 512] {
                assert!(tokens.contains(&token), "{token}: {tokens:?}");
            }
            let widest = |rows: &[usize]| rows.windows(2).map(|w| w[1] - w[0]).max().unwrap();
            assert!(widest(&ids) < SHAPE.vocab / 8 && widest(&tokens) < SHAPE.tokens / 8, "spread out: {ids:?} {tokens:?}");
        });
    }

    #[test]
    fn a_step_has_its_own_rows_and_always_the_same() {
        with_problem(|problem| {
            let ids = |seed| vocab_ids(64, SHAPE.vocab, &[problem], seed);
            assert_eq!(ids(1), ids(1));
            assert_ne!(ids(1), ids(2));
            assert_ne!(tokens(64, problem, 1), tokens(64, problem, 2));
        });
    }

    #[test]
    fn steps_are_too_large_by_memory_or_by_work() {
        let shape = |tokens, hidden, vocab| Shape { tokens, hidden, vocab };
        assert_eq!(too_large([SHAPE; 4].into_iter(), MEMORY), None);
        let wide = shape(16, 4096, 131_072);
        let by_memory = too_large([wide].into_iter(), 8 << 30).unwrap();
        assert_eq!(by_memory, "its float64 gradients take 24.0 GiB, more than 4.0 GiB, half of the free memory");
        assert_eq!(too_large([wide].into_iter(), 49 << 30), None);
        let many = shape(8192, 512, 65_536);
        assert_eq!(too_large([many].into_iter(), 1 << 40), None);
        let by_work = too_large([many; 2].into_iter(), 1 << 40).unwrap();
        assert_eq!(by_work, "each product of the replay takes 1.1e12 floating-point operations, more than 1e12");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_says_how_much_memory_is_free() {
        assert!(available_memory().is_some_and(|free| free > 1 << 20));
    }
}
