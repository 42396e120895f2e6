//! Which process wrote which rows.

use super::truth::{RowsAre, Stage};
use crate::dump::{ShapeRule, Step, TensorInfo, tensor_spec};
use fused_xent_kernels::problem::Layout;
use std::ops::Range;

/// The rows of a stage of microbatch `index` (or of the step) by the process that wrote them, in order: as the stage was
/// recorded, else as its input was. Nothing where processes share rows, or only one wrote any.
pub(super) fn owners(step: &Step, index: usize, stage: Stage) -> Vec<(Range<usize>, usize)> {
    let own = step.microbatches.get(&index).unwrap_or(&step.shared);
    let recorded = match stage {
        Stage::AccumulatedDUnembedding => step.shared.info("d_unembedding"),
        _ => own.info(stage.name()),
    };
    let input = || match stage.rows_are() {
        RowsAre::Tokens => own.info("hidden"),
        RowsAre::VocabIds => own.info("unembedding").or_else(|| step.shared.info("unembedding")),
    };
    recorded.and_then(by_process).or_else(|| input().and_then(by_process)).unwrap_or_default()
}

fn by_process(info: &TensorInfo) -> Option<Vec<(Range<usize>, usize)>> {
    let whole = &info.global_shape;
    // Along which dimension the columns lie, if there are any.
    let column = match tensor_spec(&info.name)?.shape {
        ShapeRule::Tokens => None,
        ShapeRule::Unembedding if info.layout == Layout::Dv => Some(0),
        _ => whole.len().checked_sub(1),
    };
    let rows: Vec<usize> = (0..whole.len()).filter(|&d| Some(d) != column).collect();
    let mut out: Vec<(Range<usize>, usize)> = Vec::new();
    for shard in info.shards.iter().filter(|shard| shard.replica == 0) {
        let (start, shape) = (&shard.region.start, &shard.region.shape);
        if column.is_some_and(|d| shape[d] != whole[d]) {
            return None;
        }
        let (&inner, outer) = rows.split_last()?;
        // A token's place is batch · sequence + position; without a batch there is one run.
        let [batches, length] = outer.first().map_or([0..1, 0..0], |&d| [start[d]..start[d] + shape[d], 0..whole[inner]]);
        out.extend(batches.map(|batch| {
            let first = batch * length.len() + start[inner];
            (first..first + shape[inner], shard.process)
        }));
    }
    out.retain(|(range, _)| !range.is_empty());
    out.sort_by_key(|(range, _)| range.start);
    out.dedup_by(|next, last| {
        let joins = next.1 == last.1 && next.0.start == last.0.end;
        if joins {
            last.0.end = next.0.end;
        }
        joins
    });
    let apart = out.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start);
    (apart && out.iter().any(|(_, process)| *process != out[0].1)).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dump::{ElementType, Region, ShardInfo};

    fn info(name: &str, layout: Layout, whole: &[usize], shards: &[(usize, [&[usize]; 2])]) -> TensorInfo {
        let shard = |(process, [start, shape]): &(usize, [&[usize]; 2])| ShardInfo {
            process: *process,
            path: "x.npy".into(),
            region: Region { start: start.to_vec(), shape: shape.to_vec() },
            replica: 0,
            bytes: None,
            blake3: None,
        };
        TensorInfo {
            name: name.into(),
            dtype: ElementType::Bf16,
            global_shape: whole.to_vec(),
            layout,
            bytes: 0,
            shards: shards.iter().map(shard).collect(),
            hole: None,
            input: true,
        }
    }

    #[test]
    fn rows_go_to_the_process_that_wrote_them_alone() {
        let by =
            |name, layout, whole: &[usize], shards: &[(usize, [&[usize]; 2])]| by_process(&info(name, layout, whole, shards));
        let batches: &[(usize, [&[usize]; 2])] = &[(1, [&[1, 0, 0], &[1, 6, 4]]), (0, [&[0, 0, 0], &[1, 6, 4]])];
        assert_eq!(by("hidden", Layout::Vd, &[2, 6, 4], batches), Some(vec![(0..6, 0), (6..12, 1)]));
        let sequence: &[(usize, [&[usize]; 2])] = &[(0, [&[0, 0, 0], &[2, 2, 4]]), (1, [&[0, 2, 0], &[2, 4, 4]])];
        let expected = Some(vec![(0..2, 0), (2..6, 1), (6..8, 0), (8..12, 1)]);
        assert_eq!(by("d_hidden", Layout::Vd, &[2, 6, 4], sequence), expected);
        let per_token: &[(usize, [&[usize]; 2])] = &[(0, [&[0, 0], &[2, 2]]), (1, [&[0, 2], &[2, 4]])];
        assert_eq!(by("lse", Layout::Vd, &[2, 6], per_token), expected);
        let vocab: &[(usize, [&[usize]; 2])] = &[(0, [&[0, 0], &[4, 3]]), (0, [&[0, 3], &[4, 2]]), (2, [&[0, 5], &[4, 5]])];
        assert_eq!(by("unembedding", Layout::Dv, &[4, 10], vocab), Some(vec![(0..5, 0), (5..10, 2)]));
        assert_eq!(by("unembedding", Layout::Vd, &[4, 10], vocab), None, "columns apart are no rows");
        assert_eq!(by("hidden", Layout::Vd, &[2, 6, 4], &[(3, [&[0, 0, 0], &[2, 6, 4]])]), None, "one process");
    }
}
