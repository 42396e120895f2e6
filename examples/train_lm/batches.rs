//! Microbatches of windows on the documents, masked the way real training data is.
//!
//! A window that runs over its document's end is padded there; in every fourth sequence or so the first part is a prompt,
//! which the model reads and is not trained on. So microbatches have unequal numbers of valid tokens.

use crate::random::Random;
use crate::vocabulary::END;

/// The target of a masked token.
pub const IGNORE: i32 = -100;

/// Whole sequences, one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Microbatch {
    /// What the model reads, [N].
    pub ids: Vec<u32>,
    /// What it should say next, [N]; [`IGNORE`] where masked.
    pub targets: Vec<i32>,
}

/// An endless supply of microbatches: all windows in random order, again and again.
pub struct Batches {
    /// ids and targets of each window.
    windows: Vec<Microbatch>,
    order: Vec<usize>,
    sequences: usize,
    random: Random,
}

impl Batches {
    /// Microbatches of `sequences` windows of `length` tokens on the encoded `documents`; `None` if they hold no window.
    pub fn new(documents: &[Vec<u32>], length: usize, sequences: usize, random: Random) -> Option<Self> {
        let windows: Vec<_> = documents.iter().flat_map(|d| windows(d, length)).collect();
        (!windows.is_empty()).then(|| Self { windows, order: Vec::new(), sequences, random })
    }

    /// The next microbatch.
    pub fn next(&mut self) -> Microbatch {
        let mut batch = Microbatch { ids: Vec::new(), targets: Vec::new() };
        for _ in 0..self.sequences {
            if self.order.is_empty() {
                self.order = (0..self.windows.len()).collect();
                self.random.shuffle(&mut self.order);
            }
            let Some(i) = self.order.pop() else { break };
            let window = &self.windows[i];
            let length = window.ids.len();
            let prompt = if self.random.below(4) == 0 { self.random.below(length / 2 + 1) } else { 0 };
            batch.ids.extend(&window.ids);
            batch.targets.extend(std::iter::repeat_n(IGNORE, prompt).chain(window.targets[prompt..].iter().copied()));
        }
        batch
    }
}

/// Windows of `length` tokens side by side; the last is padded.
fn windows(document: &[u32], length: usize) -> impl Iterator<Item = Microbatch> {
    let last = document.len().saturating_sub(1);
    (0..last).step_by(length).map(move |start| {
        let end = (start + length).min(last);
        let padding = start + length - end;
        let targets = document[start + 1..=end].iter().map(|&id| id as i32);
        Microbatch {
            ids: document[start..end].iter().copied().chain(std::iter::repeat_n(END, padding)).collect(),
            targets: targets.chain(std::iter::repeat_n(IGNORE, padding)).collect(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_predict_the_next_id_and_pad_the_end() {
        let found: Vec<_> = windows(&[5, 6, 7, 8, 9, END], 3).collect();
        let expected = [
            Microbatch { ids: vec![5, 6, 7], targets: vec![6, 7, 8] },
            Microbatch { ids: vec![8, 9, END], targets: vec![9, END as i32, IGNORE] },
        ];
        assert_eq!(found, expected);
        assert!(Batches::new(&[vec![END]], 3, 1, Random::new(1)).is_none());
    }

    #[test]
    fn masks_make_unequal_counts_and_seeds_make_equal_batches() {
        let documents = [(1..200).collect::<Vec<u32>>(), (1..30).collect()];
        let batches = |seed| {
            let mut batches = Batches::new(&documents, 16, 4, Random::new(seed)).unwrap();
            (0..12).map(|_| batches.next()).collect::<Vec<_>>()
        };
        let valid = |b: &Microbatch| b.targets.iter().filter(|&&t| t != IGNORE).count();
        let first = batches(1);
        assert!(first.iter().all(|b| b.ids.len() == 64 && b.targets.len() == 64 && valid(b) > 0));
        assert!(first.iter().any(|b| valid(b) != valid(&first[0])));
        assert_eq!(first, batches(1));
        assert_ne!(first, batches(2));
    }
}
