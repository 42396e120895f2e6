//! Adam with gradient clipping and a short warm-up.

use crate::model::Weights;

const BETA: [f32; 2] = [0.9, 0.95];
const EPSILON: f32 = 1e-8;
const WARM_UP: usize = 20;
const CLIP: f32 = 1.0;

/// Adam's moments, and how many updates they have seen.
pub struct Adam {
    first: Weights<f32>,
    second: Weights<f32>,
    updates: usize,
    rate: f32,
}

impl Adam {
    /// Moments of 0 for `weights`; `rate` is the learning rate after the warm-up.
    pub fn new(weights: &Weights<f32>, rate: f32) -> Self {
        Self { first: weights.zeros_like(), second: weights.zeros_like(), updates: 0, rate }
    }

    /// Moves `weights` against `gradient`, clipped to norm 1; returns the norm before clipping.
    pub fn update(&mut self, weights: &mut Weights<f32>, gradient: &Weights<f32>) -> f32 {
        self.updates += 1;
        let squares: f64 = gradient.tensors().into_iter().flatten().map(|&g| f64::from(g).powi(2)).sum();
        let norm = squares.sqrt() as f32;
        let clip = if norm > CLIP { CLIP / norm } else { 1.0 };
        let rate = self.rate * (self.updates as f32 / WARM_UP as f32).min(1.0);
        let [bias_first, bias_second] = BETA.map(|beta| 1.0 - beta.powi(self.updates as i32));
        let moments = self.first.tensors_mut().into_iter().zip(self.second.tensors_mut());
        for ((weights, gradient), (first, second)) in weights.tensors_mut().into_iter().zip(gradient.tensors()).zip(moments) {
            ndarray::Zip::from(weights).and(gradient).and(first).and(second).for_each(|w, &g, m, v| {
                let g = g * clip;
                *m += (1.0 - BETA[0]) * (g - *m);
                *v += (1.0 - BETA[1]) * (g * g - *v);
                *w -= rate * (*m / bias_first) / ((*v / bias_second).sqrt() + EPSILON);
            });
        }
        norm
    }
}
