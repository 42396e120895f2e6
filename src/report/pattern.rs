//! A pattern in words.

use super::model::Pattern;
use super::text::{count, list, percent, value};

/// Ranges and factors that a sentence lists at most.
const SHOWN: usize = 4;

/// A share that is all but for the rounding of sums.
const ALL: f64 = 1.0 - 1e-9;

/// A sentence without its full stop: how the error lies, how much of it, and every number that is known.
pub(super) fn words(pattern: &Pattern, stage: &str) -> String {
    let of_vocab = stage.contains("unembedding");
    let row = if of_vocab { "vocab id" } else { "token" };
    let tile = if of_vocab { "vocab tile" } else { "token tile" };
    let how = match pattern.kind.as_str() {
        "uniform" => "is spread evenly".to_owned(),
        "rows" => "lies in some rows".to_owned(),
        "columns" => format!("lies in some features: {}", ranges(&pattern.columns)),
        "label_rows" => "lies in the rows of labels".to_owned(),
        "hits" => "grows with the hits of the label's row".to_owned(),
        "masked_rows" => "lies in the rows of masked tokens".to_owned(),
        "process" => format!("lies in what process {} holds", pattern.process.unwrap_or(0)),
        "tail" => "lies in the last rows".to_owned(),
        "vocab_tile" | "token_tile" => in_tiles(pattern, tile),
        "label_tile" => in_tiles(pattern, "vocab tile").replacen("lies in", "lies in tokens whose label is in", 1),
        "zero_rows" => "is that rows are zero".to_owned(),
        "scale" => "is a constant factor".to_owned(),
        "row_scale" => "is a factor per row".to_owned(),
        "microbatch_scale" => "is a factor per microbatch".to_owned(),
        "nonfinite" => "is that values are not finite".to_owned(),
        other => other.to_owned(),
    };
    let share = if pattern.share >= ALL { "all of it".to_owned() } else { format!("{} of its square", percent(pattern.share)) };
    let mut text = match pattern.kind.as_str() {
        "uniform" => format!("The error {how}"),
        _ => format!("The error {how} ({share})"),
    };
    if let Some(alpha) = pattern.alpha.filter(|_| pattern.kind != "zero_rows") {
        text += &format!(", α = {}", value(alpha));
    }
    if let Some([low, high]) = pattern.alpha_range {
        text += &format!(", α from {} to {}", value(low), value(high));
    }
    if !pattern.per_microbatch.is_empty() {
        let factors: Vec<String> = pattern.per_microbatch.iter().take(2 * SHOWN).map(|alpha| value(*alpha)).collect();
        let more = pattern.per_microbatch.len() - factors.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        text += &format!(", α = {}{more}", factors.join(", "));
    }
    if let Some(slope) = pattern.slope {
        text += &match slope {
            s if s.abs() < 0.1 => ", the same whatever the hits of a row".to_owned(),
            s => format!(", as the hits of a row to the power of {s:.2}"),
        };
    }
    if let Some(first) = pattern.first_bad {
        text += &format!(", all from {row} {first} on");
        text += &match (pattern.tile, pattern.tile_candidates.len()) {
            (Some(tile), 0) => format!(", where the last tile of {tile} begins"),
            (Some(_), _) => format!(", where the last tile of {} begins", or(&pattern.tile_candidates)),
            (None, _) => String::new(),
        };
    } else if !pattern.rows.is_empty() {
        text += &format!(": {row}s {}", ranges(&pattern.rows));
    }
    if let Some([row, column]) = pattern.first {
        text += &format!(", first at [{row}, {column}]");
    }
    match (&pattern.input, pattern.origin) {
        (Some(input), _) => {
            let [row, column] = input.index;
            text += &format!(". Bad in: {}[{row}, {column}] is {}", input.tensor, input.value);
        }
        (None, Some("good_in_bad_out")) => text += ". Good in, bad out: all inputs are finite",
        _ => {}
    }
    text
}

fn in_tiles(pattern: &Pattern, tile: &str) -> String {
    let size = match (pattern.tile, pattern.tile_candidates.is_empty()) {
        (Some(size), true) => format!("{size}"),
        _ => or(&pattern.tile_candidates),
    };
    match (pattern.every, pattern.offset) {
        (Some([every, place]), _) => format!("lies in one of every {every} {tile}s of {size}, number {place}"),
        (None, Some([from, to])) if from + 1 == to => format!("lies in row {from} of every {tile} of {size}"),
        (None, Some([from, to])) => format!("lies in rows {from}–{} of every {tile} of {size}", to.saturating_sub(1)),
        (None, None) => format!("lies in one {tile} of {size}"),
    }
}

fn or(sizes: &[usize]) -> String {
    let sizes: Vec<String> = sizes.iter().map(usize::to_string).collect();
    list(&sizes).replace(" and ", " or ")
}

fn ranges(ranges: &[[usize; 2]]) -> String {
    let range = |[start, end]: &[usize; 2]| {
        if start + 1 == *end { start.to_string() } else { format!("{start}–{}", end.saturating_sub(1)) }
    };
    let mut text = ranges.iter().take(SHOWN).map(range).collect::<Vec<_>>().join(", ");
    if ranges.len() > SHOWN {
        text += &format!(" and {} more", count(ranges.len() - SHOWN, "range"));
    }
    text
}
