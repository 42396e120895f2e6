//! A byte-pair vocabulary learned from the text itself: id 0 ends a text, 1–256 are the bytes, the rest are merges.

use std::collections::HashMap;
use std::error::Error;

/// The id that ends a text, and fills what is left of a sequence after it.
pub const END: u32 = 0;
/// Ids before the first merge.
pub const BYTES: usize = 257;
/// Merges are learned from so many of the most frequent words, which bounds the time it takes.
const WORDS: usize = 4000;

/// Pairs of ids and the ids that stand for them, in the order learned.
pub struct Vocabulary {
    merges: HashMap<(u32, u32), u32>,
}

impl Vocabulary {
    /// A vocabulary of `size` ids for `documents`: each merge joins the pair most frequent at that point.
    ///
    /// # Errors
    /// If `size` leaves no room for the bytes, or the text has too few pairs for so many merges.
    pub fn learn(documents: &[String], size: usize) -> Result<Self, Box<dyn Error>> {
        if size < BYTES {
            return Err(format!("a vocabulary of {size} ids cannot hold the {BYTES} of the bytes and the end of text").into());
        }
        let mut words = frequent_words(documents);
        let mut merges = HashMap::new();
        for id in BYTES as u32..size as u32 {
            let mut pairs: HashMap<(u32, u32), usize> = HashMap::new();
            for (word, count) in &words {
                word.windows(2).for_each(|pair| *pairs.entry((pair[0], pair[1])).or_default() += count);
            }
            let best = pairs.into_iter().max_by_key(|&(pair, count)| (count, std::cmp::Reverse(pair)));
            let Some((pair, _)) = best else {
                return Err(format!("the text yields a vocabulary of {id} ids; {size} were asked for: give more text").into());
            };
            words.iter_mut().for_each(|(word, _)| merge(word, pair, id));
            merges.insert(pair, id);
        }
        Ok(Self { merges })
    }

    /// The ids of a text, with [`END`] after them.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut known: HashMap<&[u8], Vec<u32>> = HashMap::new();
        let words = words(text.as_bytes());
        let ids = words.flat_map(|word| known.entry(word).or_insert_with(|| self.encode_word(word)).clone());
        ids.chain([END]).collect()
    }

    /// Merges in the order learned, as often as any applies.
    fn encode_word(&self, word: &[u8]) -> Vec<u32> {
        let mut ids = byte_ids(word);
        while let Some((&pair, &id)) =
            ids.windows(2).filter_map(|w| self.merges.get_key_value(&(w[0], w[1]))).min_by_key(|&(_, &id)| id)
        {
            merge(&mut ids, pair, id);
        }
        ids
    }
}

/// Replaces every `pair` in `ids` by `id`.
fn merge(ids: &mut Vec<u32>, pair: (u32, u32), id: u32) {
    let mut i = 0;
    while i + 1 < ids.len() {
        if (ids[i], ids[i + 1]) == pair {
            ids[i] = id;
            ids.remove(i + 1);
        }
        i += 1;
    }
}

fn byte_ids(word: &[u8]) -> Vec<u32> {
    word.iter().map(|&b| u32::from(b) + 1).collect()
}

/// The most frequent words of the text as byte ids, with their counts.
fn frequent_words(documents: &[String]) -> Vec<(Vec<u32>, usize)> {
    let mut counts: HashMap<&[u8], usize> = HashMap::new();
    documents.iter().flat_map(|d| words(d.as_bytes())).for_each(|word| *counts.entry(word).or_default() += 1);
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by(|(a, m), (b, n)| n.cmp(m).then(a.cmp(b)));
    counts.truncate(WORDS);
    counts.into_iter().map(|(word, count)| (byte_ids(word), count)).collect()
}

/// The text cut where letters, digits, spaces, line ends and the rest meet: merges never cross such a border.
fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let class = |b: u8| match b {
        b'a'..=b'z' | b'A'..=b'Z' | b'_' | 128.. => 0,
        b'0'..=b'9' => 1,
        b' ' | b'\t' => 2,
        b'\n' | b'\r' => 3,
        _ => 4,
    };
    text.chunk_by(move |&a, &b| class(a) == class(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(vocabulary: &Vocabulary, ids: &[u32]) -> Vec<u8> {
        let parts: HashMap<u32, (u32, u32)> = vocabulary.merges.iter().map(|(&pair, &id)| (id, pair)).collect();
        let mut stack: Vec<u32> = ids.iter().rev().copied().collect();
        let mut bytes = Vec::new();
        while let Some(id) = stack.pop() {
            match parts.get(&id) {
                Some(&(a, b)) => stack.extend([b, a]),
                None if id != END => bytes.push((id - 1) as u8),
                None => {}
            }
        }
        bytes
    }

    #[test]
    fn the_most_frequent_pair_is_merged_first() {
        let v = Vocabulary::learn(&["abab ab ac".to_owned()], BYTES + 1).unwrap();
        assert_eq!(v.encode("ab"), [BYTES as u32, END]);
        assert_eq!(v.encode("ac"), [u32::from(b'a') + 1, u32::from(b'c') + 1, END]);
    }

    #[test]
    fn encoding_loses_nothing_and_is_the_same_each_time() {
        let documents = crate::text::find(40_000).unwrap();
        let v = Vocabulary::learn(&documents, 400).unwrap();
        let strange = "façade → 1,000\tunseen words\r\n".to_owned();
        for document in documents.iter().chain([&strange]) {
            let ids = v.encode(document);
            assert_eq!(decode(&v, &ids), document.as_bytes());
            assert!(ids.len() < document.len() && ids.iter().all(|&id| id < 400));
        }
        assert_eq!(Vocabulary::learn(&documents, 400).unwrap().merges, v.merges);
    }

    #[test]
    fn a_size_that_the_text_cannot_fill_is_refused() {
        assert!(Vocabulary::learn(&["ab".to_owned()], BYTES + 2).is_err());
        assert!(Vocabulary::learn(&["ab".to_owned()], BYTES - 1).is_err());
    }
}
