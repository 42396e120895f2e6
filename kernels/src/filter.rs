//! Leaving out of the two gradient products what is too small to count, with a bound on what that loses.
//!
//! dlogits of a trained model are nearly all close to 0. The products that make dQ and dK of them run over words of a few terms
//! for a few rows at a time ([`Isa::MR`] rows, [`Isa::KU`] terms); a word of which every value is small can be passed over.

use crate::cpu::{Isa, Vectorized};
use crate::lanes::{Lanes, MOST_LANES};
use crate::problem::{Problem, Shape};
use std::ops::Range;

/// Asks for gradients without the dlogits that are too small to count, and tells what that may have lost.
///
/// The value of dlogits for a token and a vocab id is *small* if it is at most `threshold` · |scale| · max(|p|, |o|), p being what
/// multiplies P there and o the onehot: for the plain loss, and any cotangent of it, if P ≤ threshold, or 1 − P at the label. Of
/// what is small as much is left out as lies in whole words of the products; nothing else is.
///
/// The bound is exact, and can be had for each element:
///
/// ```text
/// |dQ[n, d] without − with filter| ≤ small_of_tokens()[n] · max_v |K[v, d]|
/// |dK[v, d] without − with filter| ≤ small_of_ids()[v]    · max_n |Q[n, d]|
/// ```
/// beside the roundings that any such gradient has. A threshold of 2⁻¹² is usual for training in bfloat16. What is left out is a
/// bias, not noise: a vocab id that no token finds likely gets no gradient at all.
#[derive(Clone, Debug)]
pub struct Filter {
    threshold: f32,
    tokens: Vec<f64>,
    ids: Vec<f64>,
    done: [Count; 2],
}

/// Words of a product, and how many of them were multiplied.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    kept: u64,
    all: u64,
}

/// More than what summing a chunk's values in float32 can lose.
const ROUNDED_UP: f64 = 1.0 + 1.0 / 16384.0;

impl Filter {
    /// With a threshold of 0, or one that is negative or NaN, zeros alone are left out.
    pub fn new(threshold: f32) -> Self {
        Self { threshold: threshold.max(0.0), tokens: Vec::new(), ids: Vec::new(), done: Default::default() }
    }

    /// The threshold.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Σ_v |dlogits[n, v]| over the small values of each token, [N]: what its row of dQ may lack. Rounded up; of the last call.
    pub fn small_of_tokens(&self) -> Vec<f32> {
        rounded_up(&self.tokens)
    }

    /// Σ_n |dlogits[n, v]| over the small values of each vocab id, [V]: what its row of dK may lack. Rounded up; of the last call.
    pub fn small_of_ids(&self) -> Vec<f32> {
        rounded_up(&self.ids)
    }

    /// The share of the product for dQ, and of that for dK, that the last call did not leave out.
    pub fn computed(&self) -> [f64; 2] {
        self.done.map(|Count { kept, all }| if all == 0 { 1.0 } else { kept as f64 / all as f64 })
    }

    pub(crate) fn begin(&mut self, problem: &Problem) {
        let Shape { tokens, vocab, .. } = problem.shape();
        *self = Self { tokens: vec![0.0; tokens], ids: vec![0.0; vocab], ..Self::new(self.threshold) };
    }
}

/// Nothing stays nothing.
fn rounded_up(sums: &[f64]) -> Vec<f32> {
    sums.iter().map(|&sum| if sum == 0.0 { 0.0 } else { ((sum * ROUNDED_UP) as f32).next_up() }).collect()
}

/// Which words of a left operand are to be multiplied: a bit for each word, for each group of MR rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept<'a> {
    bits: &'a [u64],
    /// Elements of `bits` for each group.
    stride: usize,
}

impl<'a> Kept<'a> {
    /// The groups from `first` on.
    pub fn starting_at(self, first: usize) -> Self {
        Self { bits: &self.bits[first * self.stride..], ..self }
    }

    /// Whether one of these groups keeps anything.
    pub fn any(&self, groups: Range<usize>) -> bool {
        self.bits[groups.start * self.stride..groups.end * self.stride].iter().any(|&bits| bits != 0)
    }

    fn of_group(&self, group: usize) -> &'a [u64] {
        &self.bits[group * self.stride..][..self.stride]
    }

    /// How many of a group's `words` to multiply. Where most are kept it is all: to pick them would cost more.
    pub fn count(&self, group: usize, words: usize) -> usize {
        let count = self.of_group(group).iter().map(|bits| bits.count_ones() as usize).sum();
        if 4 * count > 3 * words { words } else { count }
    }

    /// The words that a group keeps, in order.
    pub fn words(&self, group: usize) -> impl Iterator<Item = usize> + use<'a> {
        self.of_group(group).iter().enumerate().flat_map(|(i, &bits)| {
            let mut rest = bits;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros() as usize)?;
                rest &= rest - 1;
                Some(64 * i + bit)
            })
        })
    }
}

/// What is kept and what is small in the dlogits of a stripe and a block of tokens.
#[derive(Debug)]
pub(crate) struct Sieve {
    /// Tokens of the block, a multiple of NR.
    tokens: usize,
    /// The most columns of a chunk.
    chunk: usize,
    /// For dQ: a bit for each word of a chunk's columns, by chunk and by group of MR tokens.
    by_token: Vec<u64>,
    /// By chunk and by token.
    small: Vec<f32>,
    /// By chunk.
    done: Vec<[Count; 2]>,
}

/// A chunk's share of a [`Sieve`].
#[derive(Debug)]
pub(crate) struct ChunkSieve<'a> {
    threshold: f32,
    by_token: &'a mut [u64],
    small_of_tokens: &'a mut [f32],
    small_of_ids: &'a mut [f64],
    done: &'a mut [Count; 2],
    /// For dK: a bit for each word of the block's tokens, by group of MR columns.
    by_column: Vec<u64>,
}

/// Elements that hold a bit for each of `words`.
const fn stride(words: usize) -> usize {
    words.div_ceil(64)
}

impl Sieve {
    /// For so many tokens, and columns in chunks of at most `chunk`.
    pub fn new<I: Isa>(tokens: usize, columns: usize, chunk: usize) -> Self {
        let (tokens, chunks) = (tokens.next_multiple_of(I::NR), columns.div_ceil(chunk));
        Self {
            tokens,
            chunk,
            by_token: vec![0; chunks * tokens / I::MR * stride(chunk / I::KU)],
            small: vec![0.0; chunks * tokens],
            done: vec![Default::default(); chunks],
        }
    }

    /// What each chunk of `columns` in turn may write.
    pub fn chunks<'a, I: Isa>(
        &'a mut self,
        filter: &'a mut Filter,
        columns: Range<usize>,
    ) -> impl Iterator<Item = ChunkSieve<'a>> {
        let (groups, by_column) = (self.tokens / I::MR, self.chunk / I::MR * stride(self.tokens / I::KU));
        let threshold = filter.threshold;
        let of_tokens = self.by_token.chunks_mut(groups * stride(self.chunk / I::KU)).zip(self.small.chunks_mut(self.tokens));
        let others = filter.ids[columns].chunks_mut(self.chunk).zip(&mut self.done);
        of_tokens.zip(others).map(move |((by_token, small_of_tokens), (small_of_ids, done))| ChunkSieve {
            threshold,
            by_token,
            small_of_tokens,
            small_of_ids,
            done,
            by_column: vec![0; by_column],
        })
    }

    /// For dQ: the words of columns of chunk number `place`, by group of tokens.
    pub fn by_token<I: Isa>(&self, place: usize) -> Kept<'_> {
        let stride = stride(self.chunk / I::KU);
        let len = self.tokens / I::MR * stride;
        Kept { bits: &self.by_token[place * len..][..len], stride }
    }

    /// Tells the filter what was seen in these tokens.
    pub fn finish(self, filter: &mut Filter, tokens: &[usize]) {
        for small in self.small.chunks_exact(self.tokens) {
            for (&n, &small) in tokens.iter().zip(small) {
                filter.tokens[n] += f64::from(small);
            }
        }
        for done in &self.done {
            for (total, count) in filter.done.iter_mut().zip(done) {
                total.kept += count.kept;
                total.all += count.all;
            }
        }
    }
}

impl ChunkSieve<'_> {
    /// The filter's.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Takes in dlogits [columns, NR] of panel number `panel` from column `first` of the chunk on, both in whole words and groups.
    pub fn sift<I: Isa>(&mut self, isa: I, dlogits: &[f32], limits: &Lanes, panel: usize, first: usize) {
        isa.vectorize(Sift { dlogits, limits, panel, first, sieve: self });
    }

    /// For dK: the words of tokens, by group of columns.
    pub fn by_column<I: Isa>(&self) -> Kept<'_> {
        Kept { bits: &self.by_column, stride: stride(self.small_of_tokens.len() / I::KU) }
    }

    /// Counts what is multiplied of a chunk of so many columns, once all its dlogits have been taken in.
    pub fn count<I: Isa>(&mut self, columns: usize) {
        let tokens = self.small_of_tokens.len();
        let by_token = Kept { bits: self.by_token, stride: self.by_token.len() / (tokens / I::MR) };
        let count = |kept: Kept, groups: usize, words: usize| Count {
            kept: (0..groups).map(|group| kept.count(group, words) as u64).sum(),
            all: (groups * words) as u64,
        };
        let of_columns = columns.div_ceil(I::MR);
        *self.done =
            [count(by_token, tokens / I::MR, columns.div_ceil(I::KU)), count(self.by_column::<I>(), of_columns, tokens / I::KU)];
    }
}

struct Sift<'a, 'b> {
    dlogits: &'a [f32],
    limits: &'a Lanes,
    panel: usize,
    first: usize,
    sieve: &'a mut ChunkSieve<'b>,
}

impl<I: Isa> Vectorized<I, ()> for Sift<'_, '_> {
    #[inline(always)]
    fn run(self) {
        let Self { dlogits, limits, panel, first, sieve } = self;
        let token = panel * I::NR;
        let token_stride = sieve.by_token.len() / (sieve.small_of_tokens.len() / I::MR);
        let column_stride = stride(sieve.small_of_tokens.len() / I::KU);
        let by_token = &mut sieve.by_token[token / I::MR * token_stride..];
        let set = |bits: &mut [u64], stride: usize, group: usize, word: usize| {
            bits[group * stride + word / 64] |= 1 << (word % 64);
        };
        let mut small_of_tokens = [0.0; MOST_LANES];
        for (group, columns) in dlogits.chunks_exact(I::MR * I::NR).enumerate() {
            let mut of_group = [0; MOST_LANES];
            for (word, columns) in columns.chunks_exact(I::KU * I::NR).enumerate() {
                let mut of_word = [0; MOST_LANES];
                let first = first + group * I::MR + word * I::KU;
                for (u, column) in columns.chunks_exact(I::NR).enumerate() {
                    let mut small_of_id = [0.0; MOST_LANES];
                    for start in (0..I::NR).step_by(I::LANES) {
                        for lane in start..start + I::LANES {
                            let x = column[lane].abs();
                            let small = if x <= limits[lane] { x } else { 0.0 };
                            of_word[lane] |= u32::from(x > limits[lane] || x.is_nan());
                            small_of_tokens[lane] += small;
                            small_of_id[lane - start] += small;
                        }
                    }
                    if let Some(id) = sieve.small_of_ids.get_mut(first + u) {
                        *id += f64::from(halved::<I>(&mut small_of_id));
                    }
                }
                if of_word[..I::NR].iter().fold(0, |any, large| any | large) == 0 {
                    continue;
                }
                for (tokens, large) in of_word[..I::NR].chunks_exact(I::MR).enumerate() {
                    if large.iter().fold(0, |any, large| any | large) != 0 {
                        set(by_token, token_stride, tokens, first / I::KU);
                    }
                }
                for lane in 0..I::NR {
                    of_group[lane] |= of_word[lane];
                }
            }
            for (word, large) in of_group[..I::NR].chunks_exact(I::KU).enumerate() {
                if large.iter().fold(0, |any, large| any | large) != 0 {
                    set(&mut sieve.by_column, column_stride, first / I::MR + group, token / I::KU + word);
                }
            }
        }
        for (total, &small) in sieve.small_of_tokens[token..].iter_mut().zip(&small_of_tokens[..I::NR]) {
            *total += small;
        }
    }
}

/// The sum of the first LANES values, a power of two of them.
#[inline(always)]
fn halved<I: Isa>(x: &mut Lanes) -> f32 {
    let mut len = I::LANES;
    while len > 1 {
        len /= 2;
        for i in 0..len {
            x[i] += x[i + len];
        }
    }
    x[0]
}
