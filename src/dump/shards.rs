//! Boxes within a tensor: where shards lie, whether they tile it, and how their elements get to their places.

use std::fmt::{self, Display};

/// A box of elements: `start` inclusive, `start + shape` exclusive, per dimension.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// First index, per dimension.
    pub start: Vec<usize>,
    /// Extent, per dimension.
    pub shape: Vec<usize>,
}

impl Region {
    /// Copies `part`, the region's elements row-major, to their places in `whole`, a tensor of shape `global` that it lies in.
    ///
    /// # Panics
    /// If the lengths are not those of the shapes.
    pub fn scatter<T: Copy>(&self, global: &[usize], part: &[T], whole: &mut [T]) {
        for_each_run(global, self, |at, first, run| {
            whole[at..at + run].copy_from_slice(&part[first..first + run]);
            None::<()>
        });
    }

    /// All of a tensor of that shape.
    pub fn whole(shape: &[usize]) -> Self {
        Self { start: vec![0; shape.len()], shape: shape.to_vec() }
    }

    /// Whether it lies within a tensor of that shape.
    pub fn lies_in(&self, global: &[usize]) -> bool {
        self.start.len() == global.len()
            && self.shape.len() == global.len()
            && (0..global.len()).all(|d| self.start[d].checked_add(self.shape[d]).is_some_and(|end| end <= global[d]))
    }

    /// Whether there is no element in it.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    fn end(&self, d: usize) -> usize {
        self.start[d] + self.shape[d]
    }

    /// What two regions of the same tensor share, if anything.
    fn intersection(&self, other: &Region) -> Option<Region> {
        let extent = |d: usize| self.end(d).min(other.end(d)).saturating_sub(self.start[d].max(other.start[d]));
        let dimensions = 0..self.start.len();
        // Most pairs share nothing: that is found out before anything is allocated.
        dimensions.clone().all(|d| extent(d) > 0).then(|| Region {
            start: dimensions.clone().map(|d| self.start[d].max(other.start[d])).collect(),
            shape: dimensions.map(extent).collect(),
        })
    }

    /// The parts of this region outside `hole`, which lies in it: at most two per dimension.
    fn around(&self, hole: &Region) -> Vec<Region> {
        let mut parts = Vec::new();
        let mut rest = self.clone();
        for d in 0..self.start.len() {
            if hole.start[d] > rest.start[d] {
                let mut before = rest.clone();
                before.shape[d] = hole.start[d] - rest.start[d];
                parts.push(before);
            }
            if hole.end(d) < rest.end(d) {
                let mut after = rest.clone();
                after.start[d] = hole.end(d);
                after.shape[d] = rest.end(d) - hole.end(d);
                parts.push(after);
            }
            (rest.start[d], rest.shape[d]) = (hole.start[d], hole.shape[d]);
        }
        parts
    }
}

impl Display for Region {
    /// `[0..4, 8..16]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for d in 0..self.start.len() {
            let comma = if d == 0 { "" } else { ", " };
            write!(f, "{comma}{}..{}", self.start[d], self.start[d].saturating_add(self.shape[d]))?;
        }
        f.write_str("]")
    }
}

/// Number of elements of `shape`; `None` beyond `usize`.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent))
}

/// The multi-index of row-major element `flat` of `shape`.
pub(crate) fn multi_index(shape: &[usize], mut flat: usize) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for d in (0..shape.len()).rev() {
        index[d] = flat % shape[d].max(1);
        flat /= shape[d].max(1);
    }
    index
}

/// Two of `regions` that overlap, and where.
pub(crate) fn find_overlap(regions: &[Region]) -> Option<(usize, usize, Region)> {
    let mut order: Vec<usize> = (0..regions.len()).filter(|&i| !regions[i].is_empty()).collect();
    let dimensions = order.first().map_or(0, |&i| regions[i].start.len());
    // Sweep along the dimension in which the fewest regions begin together: only regions that meet in it are compared.
    let starts = |d: usize| {
        let mut starts: Vec<usize> = order.iter().map(|&i| regions[i].start[d]).collect();
        starts.sort_unstable();
        starts.dedup();
        starts.len()
    };
    let Some(sweep) = (0..dimensions).max_by_key(|&d| starts(d)) else {
        return (order.len() > 1).then(|| (order[0], order[1], regions[order[0]].clone()));
    };
    order.sort_unstable_by_key(|&i| regions[i].start[sweep]);
    for (position, &i) in order.iter().enumerate() {
        let meets = order[position + 1..].iter().take_while(|&&j| regions[j].start[sweep] < regions[i].end(sweep));
        for &j in meets {
            if let Some(shared) = regions[i].intersection(&regions[j]) {
                return Some((i.min(j), i.max(j), shared));
            }
        }
    }
    None
}

/// A region of a tensor of shape `global` that none of `regions` covers. They do not overlap and lie within.
pub(crate) fn find_hole(global: &[usize], regions: &[Region]) -> Option<Region> {
    let whole = Region::whole(global);
    if whole.is_empty() {
        return None;
    }
    let covered: u128 = regions.iter().filter_map(|r| elements(&r.shape)).map(|n| n as u128).sum();
    if Some(covered) == elements(global).map(|n| n as u128) {
        return None;
    }
    let mut open = vec![whole];
    while let Some(region) = open.pop() {
        match regions.iter().find_map(|r| r.intersection(&region)) {
            Some(shared) => open.extend(region.around(&shared)),
            None => return Some(region),
        }
    }
    None
}

/// Calls `f(first element in the tensor, first element in the region, length)` for each run of elements that lies contiguously
/// in both a row-major tensor of shape `global` and its row-major `region`, in order, until it breaks off.
pub(crate) fn for_each_run<B>(
    global: &[usize],
    region: &Region,
    mut f: impl FnMut(usize, usize, usize) -> Option<B>,
) -> Option<B> {
    if region.is_empty() {
        return None;
    }
    // Dimensions from `inner` on are whole, so that a run spans them and the one before.
    let inner = (0..global.len()).rev().find(|&d| region.shape[d] != global[d]).map_or(0, |d| d + 1);
    let outer = inner.saturating_sub(1);
    let run: usize = region.shape[outer..].iter().product();
    let stride: Vec<usize> = (0..global.len()).map(|d| global[d + 1..].iter().product()).collect();
    let runs: usize = region.shape[..outer].iter().product();
    for r in 0..runs {
        let index = multi_index(&region.shape[..outer], r);
        let first: usize = (0..global.len()).map(|d| (region.start[d] + index.get(d).copied().unwrap_or(0)) * stride[d]).sum();
        if let Some(stop) = f(first, r * run, run) {
            return Some(stop);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(start: &[usize], shape: &[usize]) -> Region {
        Region { start: start.to_vec(), shape: shape.to_vec() }
    }

    /// How often each element is covered, the obvious way.
    fn cover(global: &[usize], regions: &[Region]) -> Vec<usize> {
        (0..elements(global).unwrap())
            .map(|flat| {
                let index = multi_index(global, flat);
                regions.iter().filter(|r| (0..global.len()).all(|d| (r.start[d]..r.end(d)).contains(&index[d]))).count()
            })
            .collect()
    }

    fn small_case() -> impl Strategy<Value = (Vec<usize>, Vec<Region>)> {
        proptest::collection::vec(1usize..5, 1..4).prop_flat_map(|global| {
            let one: Vec<_> = global.iter().map(|&n| (0..=n).prop_flat_map(move |s| (Just(s), 0..=n - s))).collect();
            let regions = proptest::collection::vec(one, 0..5).prop_map(|boxes| {
                boxes
                    .into_iter()
                    .map(|b| Region { start: b.iter().map(|x| x.0).collect(), shape: b.iter().map(|x| x.1).collect() })
            });
            (Just(global), regions.prop_map(|r| r.collect()))
        })
    }

    proptest! {
        #[test]
        fn overlaps_and_holes_are_those_of_counting((global, regions) in small_case()) {
            let cover = cover(&global, &regions);
            let overlap = find_overlap(&regions);
            prop_assert_eq!(overlap.is_some(), cover.iter().any(|&n| n > 1));
            if let Some((i, j, shared)) = overlap {
                prop_assert!(i < j && !shared.is_empty());
                prop_assert_eq!(regions[i].intersection(&regions[j]), Some(shared));
            } else {
                let hole = find_hole(&global, &regions);
                prop_assert_eq!(hole.is_some(), cover.contains(&0));
                if let Some(hole) = hole {
                    prop_assert!(!hole.is_empty() && hole.lies_in(&global));
                    prop_assert!(regions.iter().all(|r| r.intersection(&hole).is_none()));
                }
            }
        }

        #[test]
        fn runs_visit_the_region_in_order((global, regions) in small_case()) {
            for r in &regions {
                let mut visited = Vec::new();
                for_each_run(&global, r, |first, from, run| {
                    assert_eq!(from, visited.len());
                    visited.extend(first..first + run);
                    None::<()>
                });
                let inside = |flat: &usize| cover(&global, std::slice::from_ref(r))[*flat] == 1;
                let expected: Vec<usize> = (0..elements(&global).unwrap()).filter(inside).collect();
                prop_assert_eq!(visited, expected);
            }
        }
    }

    #[test]
    fn a_hole_is_named_by_its_region() {
        let regions = [region(&[0, 0], &[2, 8]), region(&[2, 4], &[2, 4])];
        assert_eq!(find_hole(&[4, 8], &regions).unwrap().to_string(), "[2..4, 0..4]");
        assert_eq!(find_hole(&[], &[]).unwrap().to_string(), "[]");
        assert!(find_overlap(&[region(&[], &[]), region(&[], &[])]).is_some());
    }
}
