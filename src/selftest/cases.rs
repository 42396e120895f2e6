//! What is computed: problems of every kind that the kernels tell apart, small ones with ragged tails and real ones.

use crate::dump::Elements;
use crate::pjrt::{Element, HostTensor};
use fused_xent_kernels::Dlogits;
use fused_xent_kernels::problem::{DType, Floats, Inputs, Layout, LossOptions, Problem, ProblemError, Sample, Shape};
use half::bf16;
use rayon::prelude::*;

/// A problem, what is done with it, and what it shows.
#[derive(Clone, Debug)]
pub struct Case {
    /// In reports and as part of file names.
    pub name: String,
    /// What it shows.
    pub about: &'static str,
    /// N, D and V.
    pub shape: Shape,
    /// How K lies.
    pub layout: Layout,
    /// Of Q and K.
    pub inputs: [DType; 2],
    /// Of the loss.
    pub options: LossOptions,
    /// What Q and K hold.
    pub values: Values,
    /// Of dQ and dK.
    pub gradients: [DType; 2],
    /// In the gradient products.
    pub dlogits: Dlogits,
    /// Size of the cotangents of loss, lse and label logits; 0: none.
    pub cotangents: [f64; 3],
    /// Half of the tokens is run at a time, and the second dK added to the first.
    pub accumulate: bool,
    /// What takes no part is NaN: rows of Q and cotangents of masked tokens, rows of K that are padding.
    pub poison: bool,
    /// How the backward is cut; `None`: as the plan for the chip says.
    pub form: Option<Form>,
    /// Rows of each gradient that are judged; `None`: all.
    pub sample: Option<usize>,
    /// One of those that are run where there is little time.
    pub quick: bool,
    /// Run on TPUs alone: elsewhere it takes too long.
    pub large: bool,
}

/// How a backward is cut: tiles of 128 tokens and 256 vocab ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One pass over all tokens.
    OnePass,
    /// One pass over each 128 tokens, whose dK are summed.
    Chunks,
    /// dQ and dK apart.
    TwoKernels,
}

/// What Q and K hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Values {
    /// Noise, of which the logits have this standard deviation.
    Noise(f64),
    /// Id 0 has all the probability; from the others the gradient of K is exp, from −17 down to −87.
    Exp,
    /// Logits of 0 and −200, so that lse is the logarithm of a whole number.
    Log,
    /// With a cap of 1 each token's label logit is tanh of a number from −4 to 4.
    Tanh,
    /// Each token's label logit is one product of two float32.
    Product,
    /// Each token's label logit is a sum of whole numbers that float32 holds, in whatever order it is made.
    WholeNumbers,
}

impl Values {
    /// The tensor that shows it, whether it must be exact, and from which row on it is looked at.
    pub fn measured(self) -> Option<Measured> {
        let measured = |what, stage, exact, from| Some(Measured { what, stage, exact, from });
        match self {
            Values::Noise(_) => None,
            Values::Exp => measured("exp", "d_unembedding", false, 1),
            Values::Log => measured("log", "lse", false, 0),
            Values::Tanh => measured("tanh", "label_logits", false, 0),
            Values::Product => measured("product", "label_logits", false, 0),
            Values::WholeNumbers => measured("sum", "label_logits", true, 0),
        }
    }
}

/// What a case isolates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// The function.
    pub what: &'static str,
    /// Where it shows.
    pub stage: &'static str,
    /// Any deviation at all is a failure.
    pub exact: bool,
    /// Rows before this one show something else.
    pub from: usize,
}

/// Neither D nor V nor N is a multiple of a tile.
const SMALL: Shape = Shape { tokens: 300, hidden: 136, vocab: 1000 };

impl Case {
    fn small(name: &str, about: &'static str) -> Self {
        Self {
            name: name.into(),
            about,
            shape: SMALL,
            layout: Layout::Vd,
            inputs: [DType::Bf16; 2],
            options: LossOptions::default(),
            values: Values::Noise(2.0),
            gradients: [DType::Bf16, DType::F32],
            dlogits: Dlogits::Bf16,
            cotangents: [1.0, 0.0, 0.0],
            accumulate: false,
            poison: false,
            form: None,
            sample: None,
            quick: false,
            large: false,
        }
    }

    fn isolated(name: &str, about: &'static str, values: Values, shape: Shape) -> Self {
        Self { values, shape, gradients: [DType::F32; 2], quick: true, ..Self::small(name, about) }
    }

    /// A training run's: bfloat16 in, dK summed in float32.
    pub fn real(shape: Shape) -> Self {
        let Shape { tokens, hidden, vocab } = shape;
        Self {
            shape,
            ..Self::small(&format!("real-{tokens}x{hidden}x{vocab}"), "a training run's shape; rows of the gradients are sampled")
        }
    }
}

fn form_name(form: Form) -> &'static str {
    match form {
        Form::OnePass => "one-pass",
        Form::Chunks => "chunks",
        Form::TwoKernels => "two-kernels",
    }
}

const FORMS: [Form; 3] = [Form::OnePass, Form::Chunks, Form::TwoKernels];

/// Rows of each gradient that are judged of a real shape.
const SAMPLED: usize = 128;

/// All cases, those of small shapes first; `quick`: few of them, without real shapes.
pub fn all(quick: bool) -> Vec<Case> {
    let everything = LossOptions {
        ignore_index: -100,
        valid_vocab: Some(700),
        logit_scale: 0.6,
        logit_softcap: Some(5.0),
        z_loss: 1e-3,
        label_smoothing: 0.1,
    };
    let base = LossOptions::default();
    let mut cases = vec![];
    for form in FORMS {
        let name = |what: &str| format!("{}{what}", form_name(form));
        let case = |what: &str, about| Case { form: Some(form), ..Case::small(&name(what), about) };
        cases.extend([
            Case { quick: true, ..case("", "ragged tails of tokens, features and vocab ids") },
            Case { layout: Layout::Dv, ..case("-dv", "K as [D, V]") },
            Case {
                inputs: [DType::F32; 2],
                gradients: [DType::F32; 2],
                ..case("-f32", "float32 inputs: products by contract_precision")
            },
            Case { options: everything, layout: Layout::Dv, ..case("-options", "every option at once, K as [D, V]") },
            Case {
                options: LossOptions { valid_vocab: Some(700), ..base },
                poison: true,
                quick: true,
                ..case("-nan", "NaN in masked rows of Q and in padding rows of K")
            },
            Case { accumulate: true, quick: form == Form::OnePass, ..case("-accumulate", "dK of two calls, summed in place") },
        ]);
    }
    let with = |name: &str, about, options| Case { options, ..Case::small(name, about) };
    let shaped = |name: &str, about, [tokens, hidden, vocab]: [usize; 3]| Case {
        shape: Shape { tokens, hidden, vocab },
        ..Case::small(name, about)
    };
    cases.extend([
        with("softcap", "a cap on the logits", LossOptions { logit_softcap: Some(5.0), ..base }),
        with("scale", "a factor on the logits", LossOptions { logit_scale: -0.37, ..base }),
        with("z-loss", "a term in lse²", LossOptions { z_loss: 1e-3, ..base }),
        with("smoothing", "label smoothing", LossOptions { label_smoothing: 0.1, ..base }),
        with("padding", "vocab ids that are padding", LossOptions { valid_vocab: Some(667), ..base }),
        Case { quick: true, ..with("options", "every option at once", everything) },
        Case { gradients: [DType::Bf16; 2], ..Case::small("bf16-gradients", "both gradients rounded to bfloat16, once") },
        Case {
            inputs: [DType::Bf16, DType::F32],
            gradients: [DType::F32; 2],
            ..Case::small("mixed", "Q in bfloat16, K in float32")
        },
        Case {
            dlogits: Dlogits::Bf16x2,
            gradients: [DType::F32; 2],
            ..Case::small("dlogits-bf16x2", "dlogits as a high and a low bfloat16")
        },
        Case { dlogits: Dlogits::F32, gradients: [DType::F32; 2], ..Case::small("dlogits-f32", "dlogits in float32") },
        Case {
            cotangents: [0.7, 0.2, -0.4],
            quick: true,
            ..Case::small("cotangents", "cotangents of loss, lse and label logits")
        },
        Case { cotangents: [0.0, 0.0, 0.9], ..Case::small("cotangent-label", "a cotangent of the label logits alone") },
        Case { values: Values::Noise(1e-3), ..Case::small("logits-tiny", "logits near 0") },
        Case { values: Values::Noise(30.0), ..Case::small("logits-large", "logits of size 30") },
        Case {
            values: Values::Noise(1000.0),
            ..Case::small("logits-huge", "logits of size 1000: one id has all the probability")
        },
        shaped("one-token", "N = 1", [1, 8, 130]),
        shaped("whole-tiles", "no tail anywhere", [256, 128, 1024]),
        shaped("wide-4096", "D = 4096", [200, 4096, 700]),
        shaped("wide-8192", "D = 8192", [130, 8192, 300]),
    ]);
    let sizes = |tokens, hidden, vocab| Shape { tokens, hidden, vocab };
    let cap = LossOptions { logit_softcap: Some(1.0), ..base };
    cases.extend([
        Case {
            dlogits: Dlogits::F32,
            ..Case::isolated("exp", "the device's exp, from −17 to −87, in dK", Values::Exp, sizes(1, 8, 400))
        },
        Case::isolated("log", "the device's log of 1 to 1000, in lse", Values::Log, sizes(128, 128, 1000)),
        Case {
            options: cap,
            ..Case::isolated("tanh", "the device's tanh from −4 to 4, in the label logits", Values::Tanh, sizes(256, 8, 256))
        },
        Case {
            inputs: [DType::F32; 2],
            ..Case::isolated("product-f32", "one float32 product a label logit", Values::Product, sizes(256, 8, 256))
        },
        Case::isolated(
            "sum-exact",
            "sums of 4096 whole numbers, which float32 holds",
            Values::WholeNumbers,
            sizes(128, 4096, 256),
        ),
    ]);
    let real = |tokens, hidden, vocab| Case { sample: Some(SAMPLED), ..Case::real(sizes(tokens, hidden, vocab)) };
    cases.push(real(1024, 512, 16032));
    cases.extend([real(4096, 1024, 50304), real(2048, 4096, 128256)].map(|case| Case { large: true, ..case }));
    cases.retain(|case| case.quick || !quick);
    cases
}

/// The numbers of a case.
#[derive(Clone, Debug)]
pub struct Data {
    hidden: Numbers,
    unembedding: Numbers,
    targets: Vec<i64>,
    /// Of loss, lse and label logits, [N] each.
    pub cotangents: [Option<Vec<f32>>; 3],
}

#[derive(Clone, Debug)]
enum Numbers {
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
}

impl Numbers {
    fn new(dtype: DType, len: usize, value: impl Fn(usize) -> f64 + Sync) -> Self {
        let all = (0..len).into_par_iter();
        match dtype {
            DType::Bf16 => Numbers::Bf16(all.map(|i| bf16::from_f64(value(i))).collect()),
            _ => Numbers::F32(all.map(|i| value(i) as f32).collect()),
        }
    }

    fn floats(&self) -> Floats<'_> {
        match self {
            Numbers::Bf16(x) => x[..].into(),
            Numbers::F32(x) => x[..].into(),
        }
    }

    fn set_nan(&mut self, i: usize) {
        match self {
            Numbers::Bf16(x) => x[i] = bf16::NAN,
            Numbers::F32(x) => x[i] = f32::NAN,
        }
    }
}

/// Noise of mean 0 and deviation 1 from a counter: four uniform numbers, added.
fn noise(seed: u64, i: usize) -> f64 {
    let mut z = (seed << 48 ^ i as u64).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let sum: u64 = (0..4).map(|part| z >> (16 * part) & 0xffff).sum();
    ((sum as f64 + 2.0) / 65536.0 - 2.0) * 3f64.sqrt()
}

impl Case {
    /// Its numbers, the same for every call.
    pub fn data(&self) -> Data {
        let Shape { tokens, hidden, vocab } = self.shape;
        let valid = self.options.valid_vocab.unwrap_or(vocab);
        let first = |d: usize, x: f64| if d == 0 { x } else { 0.0 };
        let steps = |v: usize| v as f64 / (vocab - 1) as f64;
        let values = self.values;
        let of_q = move |n: usize, d: usize| match values {
            Values::Noise(_) => noise(1, n * hidden + d),
            Values::Log => f64::from(u8::from(n == d)),
            Values::Product => first(d, noise(1, n)),
            Values::WholeNumbers => 1.0,
            Values::Exp | Values::Tanh => first(d, 1.0),
        };
        let of_k = move |v: usize, d: usize| match values {
            Values::Noise(spread) => spread / (hidden as f64).sqrt() * noise(2, v * hidden + d),
            Values::Exp => first(d, if v == 0 { 0.0 } else { -17.0 - 70.0 * steps(v) }),
            Values::Log if v <= (vocab - 1) * d / (hidden - 1) => 0.0,
            Values::Log => -200.0,
            Values::Tanh => first(d, 8.0 * steps(v) - 4.0),
            Values::Product => first(d, noise(2, v)),
            Values::WholeNumbers => ((v * 31 + d * 7919) % 257) as f64,
        };
        let layout = self.layout;
        let of_k = move |i: usize| if layout == Layout::Vd { of_k(i / hidden, i % hidden) } else { of_k(i % vocab, i / vocab) };
        // First, last, and around the borders of tiles.
        let ids = [0, valid - 1, 3, 4, 7, 8, 127, 128, 255, 256, 511, 512, valid / 2];
        let target = |n: usize| match (values, n % 8) {
            (Values::Exp | Values::Log, _) => 0,
            (Values::Tanh | Values::Product | Values::WholeNumbers, _) => (n % valid) as i64,
            (_, 5) => self.options.ignore_index,
            (_, i) if i % 2 == 0 => (ids[(n / 2) % ids.len()] % valid) as i64,
            _ => (n * 7919 % valid) as i64,
        };
        let size = |k: usize| self.cotangents[k];
        // An isolated gradient is that of a cotangent of 1.
        let varied = if matches!(values, Values::Noise(_)) { 0.3 } else { 0.0 };
        let cotangents = |k: usize| (0..tokens).map(|n| (size(k) * (1.0 + varied * noise(3 + k as u64, n))) as f32).collect();
        Data {
            hidden: Numbers::new(self.inputs[0], tokens * hidden, |i| of_q(i / hidden, i % hidden)),
            unembedding: Numbers::new(self.inputs[1], vocab * hidden, of_k),
            targets: (0..tokens).map(target).collect(),
            cotangents: std::array::from_fn(|k| (size(k) != 0.0).then(|| cotangents(k))),
        }
    }

    /// The checked problem.
    ///
    /// # Errors
    /// If the options make none.
    pub fn problem<'a>(&self, data: &'a Data) -> Result<Problem<'a>, ProblemError> {
        let inputs = Inputs {
            hidden: data.hidden.floats(),
            unembedding: data.unembedding.floats(),
            layout: self.layout,
            targets: data.targets[..].into(),
            token_weights: None,
            shape: self.shape,
            shard: None,
        };
        Problem::new(inputs, self.options)
    }

    /// The rows of the gradients that are judged, if not all: first and last ones, labels, and others spread evenly.
    pub fn rows(&self, problem: &Problem) -> Option<Sample> {
        let rows = self.sample?;
        let Shape { tokens, vocab, .. } = self.shape;
        let spread = |count: usize| (0..rows).map(move |i| i * (count - 1) / (rows - 1).max(1));
        let labels = problem.labels().iter().filter_map(|label| label.column());
        let ids = spread(vocab).chain(labels.take(rows / 4)).collect();
        Some(Sample::new(self.shape, spread(tokens).collect(), ids).expect("rows within the shape"))
    }
}

impl Data {
    /// With NaN where nothing takes part.
    pub fn poisoned(mut self, case: &Case) -> Self {
        let Shape { tokens, hidden, vocab } = case.shape;
        for n in (0..tokens).filter(|&n| self.targets[n] == case.options.ignore_index) {
            (0..hidden).for_each(|d| self.hidden.set_nan(n * hidden + d));
            self.cotangents.iter_mut().flatten().for_each(|cotangents| cotangents[n] = f32::NAN);
        }
        for v in case.options.valid_vocab.unwrap_or(vocab)..vocab {
            (0..hidden)
                .for_each(|d| self.unembedding.set_nan(if case.layout == Layout::Vd { v * hidden + d } else { d * vocab + v }));
        }
        self
    }

    /// Q, [N, D].
    pub fn hidden(&self, case: &Case) -> HostTensor {
        tensor(&self.hidden, &[case.shape.tokens, case.shape.hidden])
    }

    /// K, as it lies.
    pub fn unembedding(&self, case: &Case) -> HostTensor {
        let Shape { hidden, vocab, .. } = case.shape;
        tensor(&self.unembedding, &if case.layout == Layout::Vd { [vocab, hidden] } else { [hidden, vocab] })
    }

    /// Vocab ids, −1 where the token is masked.
    pub fn labels(&self, case: &Case) -> HostTensor {
        let label = |&target: &i64| if target == case.options.ignore_index { -1 } else { target as i32 };
        let bytes = self.targets.iter().flat_map(|target| label(target).to_le_bytes()).collect();
        HostTensor { element: Element::I32, dims: vec![self.targets.len()], bytes }
    }
}

/// One number per token.
pub fn per_token(values: &[f32]) -> HostTensor {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    HostTensor { element: Element::F32, dims: vec![values.len()], bytes }
}

fn tensor(numbers: &Numbers, dims: &[usize]) -> HostTensor {
    let element = if matches!(numbers, Numbers::Bf16(_)) { Element::Bf16 } else { Element::F32 };
    HostTensor { element, dims: dims.to_vec(), bytes: Elements::from(numbers.floats()).bytes().to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_case_is_a_problem_with_a_name_of_its_own() {
        let cases = all(false);
        let names: BTreeSet<&str> = cases.iter().map(|case| &*case.name).collect();
        assert_eq!(names.len(), cases.len());
        assert!(names.iter().all(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')));
        for case in cases.iter().filter(|case| !case.large) {
            case.problem(&case.data()).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        }
        assert!(all(true).iter().all(|case| names.contains(&*case.name)));
    }

    #[test]
    fn noise_is_noise() {
        let all: Vec<f64> = (0..100_000).map(|i| noise(1, i)).collect();
        let mean = all.iter().sum::<f64>() / 1e5;
        let variance = all.iter().map(|x| x * x).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
    }
}
