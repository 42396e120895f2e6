//! Exponentials and logarithms of low accuracy, as kernels have them: a power of two times a polynomial.

use super::counterfactual::bf16;
use std::f64::consts::{LN_2, LOG2_E, PI};
use std::sync::OnceLock;

/// Which exp or log is approximate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Approximation {
    /// None.
    #[default]
    None,
    /// The log of the sum of exponentials: a polynomial of that degree for log₂ of the significand.
    Log {
        /// Of the polynomial.
        degree: usize,
    },
    /// The exponentials: a polynomial of that degree for 2^f, 0 ≤ f < 1.
    Exp {
        /// Of the polynomial.
        degree: usize,
        /// In the backward's P too, or in lse alone.
        in_backward: bool,
    },
    /// The exponentials, right to bf16.
    ExpBf16 {
        /// In the backward's P too, or in lse alone.
        in_backward: bool,
    },
    /// The exponentials, in P too: 2^⌊y⌋ times a given polynomial of y − ⌊y⌋, of y = x·log₂e.
    Significand(Significand),
    /// By a formula that is not known: lse is the one recorded.
    AsRecorded,
}

/// Coefficients of a [`Significand`] at most.
pub const SIGNIFICAND_TERMS: usize = 6;

/// A polynomial for 2^f, 0 ≤ f < 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Significand {
    /// Of 1, f, f², …
    pub coefficients: [f64; SIGNIFICAND_TERMS],
    /// Whether lse is the one recorded, and not what the polynomial makes of all exponentials at once.
    pub lse_as_recorded: bool,
}

/// An exponential.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Exp {
    Exact,
    Polynomial(usize),
    Significand([f64; SIGNIFICAND_TERMS]),
    Bf16,
}

impl Approximation {
    /// The exponential that the forward sums.
    pub(super) fn forward(self) -> Exp {
        match self {
            Approximation::Exp { degree, .. } => Exp::Polynomial(degree),
            Approximation::ExpBf16 { .. } => Exp::Bf16,
            Approximation::Significand(significand) => Exp::Significand(significand.coefficients),
            _ => Exp::Exact,
        }
    }

    /// The exponential that makes P in the backward.
    pub(super) fn backward(self) -> Exp {
        match self {
            Approximation::Exp { in_backward: true, .. }
            | Approximation::ExpBf16 { in_backward: true }
            | Approximation::Significand(_) => self.forward(),
            _ => Exp::Exact,
        }
    }

    /// Whether lse is the one recorded.
    pub(super) fn lse_as_recorded(self) -> bool {
        matches!(self, Approximation::AsRecorded | Approximation::Significand(Significand { lse_as_recorded: true, .. }))
    }

    /// log x.
    pub(super) fn log(self, x: f64) -> f64 {
        let Approximation::Log { degree } = self else { return x.ln() };
        let exponent = x.log2().floor();
        (exponent + polynomials().log2[degree.min(MOST_DEGREE)].at(x / exponent.exp2())) * LN_2
    }
}

impl Exp {
    /// exp x.
    pub fn of(self, x: f64) -> f64 {
        match self {
            Exp::Exact => x.exp(),
            Exp::Bf16 => bf16(x.exp()),
            Exp::Polynomial(degree) => {
                let (power, f) = split(x);
                power * polynomials().exp2[degree.min(MOST_DEGREE)].at(f)
            }
            Exp::Significand(coefficients) => {
                let (power, f) = split(x);
                power * coefficients.iter().rev().fold(0.0, |sum, c| sum * f + c)
            }
        }
    }
}

/// exp x = 2^⌊y⌋ · 2^f: the power of two, and f.
pub(super) fn split(x: f64) -> (f64, f64) {
    let y = (x * LOG2_E).max(-1000.0);
    (y.floor().exp2(), y - y.floor())
}

const MOST_DEGREE: usize = 12;

struct Polynomials {
    /// Of 2^f on [0, 1], by degree.
    exp2: Vec<Newton>,
    /// Of log₂ on [1, 2].
    log2: Vec<Newton>,
}

fn polynomials() -> &'static Polynomials {
    static POLYNOMIALS: OnceLock<Polynomials> = OnceLock::new();
    POLYNOMIALS.get_or_init(|| Polynomials {
        exp2: (0..=MOST_DEGREE).map(|degree| Newton::new(degree, 0.0, f64::exp2)).collect(),
        log2: (0..=MOST_DEGREE).map(|degree| Newton::new(degree, 1.0, f64::log2)).collect(),
    })
}

/// The polynomial that meets a function at the Chebyshev nodes of an interval of length 1, in Newton's form.
struct Newton {
    nodes: Vec<f64>,
    coefficients: Vec<f64>,
}

impl Newton {
    fn new(degree: usize, start: f64, f: fn(f64) -> f64) -> Self {
        let node = |i: usize| start + 0.5 - 0.5 * (PI * (i as f64 + 0.5) / (degree + 1) as f64).cos();
        let nodes: Vec<f64> = (0..=degree).map(node).collect();
        let mut coefficients: Vec<f64> = nodes.iter().map(|&x| f(x)).collect();
        for order in 1..=degree {
            for i in (order..=degree).rev() {
                coefficients[i] = (coefficients[i] - coefficients[i - 1]) / (nodes[i] - nodes[i - order]);
            }
        }
        Self { nodes, coefficients }
    }

    fn at(&self, x: f64) -> f64 {
        self.nodes.iter().zip(&self.coefficients).rev().fold(0.0, |sum, (node, c)| sum * (x - node) + c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_higher_degree_is_more_accurate() {
        let xs: Vec<f64> = (0..1000).map(|i| -20.0 + 0.0237 * f64::from(i)).collect();
        let exp = |degree: usize| xs.iter().map(|&x| (Exp::Polynomial(degree).of(x) / x.exp() - 1.0).abs()).fold(0.0, f64::max);
        let log = |degree| xs.iter().map(|&x| (Approximation::Log { degree }.log(x.exp()) - x).abs()).fold(0.0, f64::max);
        assert!((5e-5..2e-4).contains(&exp(3)), "{}", exp(3));
        assert!((3e-5..2e-4).contains(&log(4)), "{}", log(4));
        assert!(exp(10) < 1e-12 && log(12) < 1e-9 && exp(2) > exp(3), "{} {}", exp(10), log(12));
    }
}
