//! The search on benches whose truth is known: what is found is minimal, at a bounded number of runs.

use fused_xent::isolate::Set;
use fused_xent::isolate::search::{Bench, Culprit, Found, Minimum, Step, Tallies, search};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use std::collections::BTreeSet;

const MINIMUM: Minimum = Minimum { pass: 2, fail: 2 };

/// Fails where `fails` says so, and refuses after `budget` runs.
struct Made<F> {
    fails: F,
    budget: usize,
    runs: Vec<Set>,
}

impl<F: FnMut(&Set) -> bool> Bench for Made<F> {
    type Stop = ();

    fn fails(&mut self, on: &Set, _: Step) -> Result<bool, ()> {
        if self.runs.len() == self.budget {
            return Err(());
        }
        self.runs.push(on.clone());
        Ok((self.fails)(on))
    }
}

/// What is found among `n` switches, and the runs that it took.
fn found(n: usize, fails: impl FnMut(&Set) -> bool) -> (Found, Vec<Set>) {
    let mut bench = Made { fails, budget: usize::MAX, runs: vec![] };
    let found = search(&mut bench, n, MINIMUM, &mut Tallies::new()).unwrap();
    (found, bench.runs)
}

#[track_caller]
fn culprit(n: usize, fails: impl FnMut(&Set) -> bool) -> (Culprit, Vec<Set>) {
    match found(n, fails) {
        (Found::Culprit(culprit), runs) => (culprit, runs),
        (other, _) => panic!("{other:?}"),
    }
}

fn set(switches: &[usize]) -> Set {
    switches.iter().copied().collect()
}

fn without(set: &Set, switch: usize) -> Set {
    set.iter().copied().filter(|&i| i != switch).collect()
}

#[test]
fn a_single_culprit_costs_one_run_a_switch_and_the_confirmation() {
    let (culprit, runs) = culprit(8, |on| on.contains(&5));
    assert_eq!(culprit, Culprit { set: set(&[5]), alone: vec![5], cures: vec![set(&[5])] });
    // Off and on twice each, eight alone, the culprit again, all but it twice.
    assert_eq!(runs.len(), 4 + 8 + 1 + 2);
}

#[test]
fn a_pair_is_narrowed_down_and_either_of_it_cures() {
    let (culprit, runs) = culprit(16, |on| on.contains(&3) && on.contains(&12));
    assert_eq!(culprit, Culprit { set: set(&[3, 12]), alone: vec![], cures: vec![set(&[3]), set(&[12])] });
    assert!(runs.len() < 60, "{}", runs.len());
}

#[test]
fn several_that_fail_alone_must_all_be_left_out() {
    let (culprit, _) = culprit(5, |on| on.contains(&1) || on.contains(&4));
    assert_eq!(culprit, Culprit { set: set(&[1]), alone: vec![1, 4], cures: vec![set(&[1, 4])] });
}

#[test]
fn two_pairs_are_cured_by_one_of_each() {
    let pair = |on: &Set, a, b| on.contains(&a) && on.contains(&b);
    let (culprit, _) = culprit(6, |on| pair(on, 0, 1) || pair(on, 3, 5));
    assert_eq!(culprit.set.len(), 2);
    assert_eq!(culprit.cures.len(), 1);
    assert_eq!(culprit.cures[0].len(), 2);
}

#[test]
fn one_switch_that_both_pairs_share_cures_alone() {
    let (culprit, _) = culprit(6, |on| on.contains(&2) && (on.contains(&0) || on.contains(&5)));
    assert_eq!((culprit.set.len(), culprit.cures), (2, vec![set(&[2])]));
}

#[test]
fn what_fails_without_switches_or_never_is_said_to() {
    let (found_, runs) = found(3, |_| true);
    assert_eq!((found_, runs.len()), (Found::BaselineFails, 2));
    let mut turn = 0;
    let (found_, _) = found(3, |_| {
        turn += 1;
        turn == 2
    });
    assert_eq!(found_, Found::BaselineFails);
    let (found_, runs) = found(3, |_| false);
    assert_eq!((found_, runs.len()), (Found::NothingFails, 2 + 2 + 3));
}

#[test]
fn a_failure_that_another_switch_hides_is_found_alone() {
    let (culprit, _) = culprit(4, |on| on.contains(&2) && !on.contains(&0));
    assert_eq!(culprit, Culprit { set: set(&[2]), alone: vec![2], cures: vec![] });
}

/// A number of switches, and sets of them whose supersets fail.
fn families() -> impl Strategy<Value = (usize, Vec<Set>)> {
    (1usize..11).prop_flat_map(|n| {
        let failing = prop::collection::btree_set(0..n, 1..=n.min(5));
        (Just(n), prop::collection::vec(failing, 1..4))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_is_found_is_minimal_and_takes_few_runs((n, family) in families()) {
        let fails = |on: &Set| family.iter().any(|set| set.is_subset(on));
        let all: Set = (0..n).collect();
        let (culprit, runs) = culprit(n, fails);
        prop_assert!(fails(&culprit.set));
        for &switch in &culprit.set {
            prop_assert!(!fails(&without(&culprit.set, switch)), "{:?} is not minimal", culprit.set);
        }
        let alone: Vec<usize> = (0..n).filter(|&i| fails(&set(&[i]))).collect();
        prop_assert_eq!(&culprit.alone, &alone);
        prop_assert!(!culprit.cures.is_empty());
        let cured = |cure: &Set| !fails(&all.difference(cure).copied().collect());
        for cure in &culprit.cures {
            prop_assert!(cured(cure));
            for &switch in cure {
                prop_assert!(cure.len() == 1 || !cured(&without(cure, switch)), "{:?} is not minimal", cure);
            }
        }
        if alone.is_empty() {
            // Any single switch that cures is in every set that fails.
            let single: Vec<Set> = (0..n).map(|i| set(&[i])).filter(cured).collect();
            prop_assert!(single.is_empty() || single == culprit.cures, "{:?} cure", single);
        }
        // Delta debugging takes at most n² + 3n runs; here twice, for the culprit and for the cure, and then each set of the
        // conclusion again.
        let distinct: BTreeSet<&Set> = runs.iter().collect();
        let bound = 2 + n + if alone.is_empty() { 2 * (n * n + 3 * n) } else { n * n + 3 * n };
        prop_assert!(distinct.len() <= bound, "{} sets of {n} switches", distinct.len());
        prop_assert!(runs.len() <= distinct.len() + 2 + 2 * n + 2 * n, "{} runs of {} sets", runs.len(), distinct.len());
    }

    #[test]
    fn a_search_that_was_interrupted_repeats_nothing((n, family) in families(), at in 0usize..40) {
        let fails = |on: &Set| family.iter().any(|set| set.is_subset(on));
        let (whole, runs) = found(n, fails);
        let mut tallies = Tallies::new();
        let mut bench = Made { fails, budget: at, runs: vec![] };
        let first = search(&mut bench, n, MINIMUM, &mut tallies);
        prop_assert_eq!(first.is_err(), at < runs.len());
        bench.budget = usize::MAX;
        prop_assert_eq!(search(&mut bench, n, MINIMUM, &mut tallies), Ok(whole));
        prop_assert_eq!(bench.runs, runs);
    }

    #[test]
    fn whatever_fails_when_it_likes_the_search_ends(seed in any::<u64>(), n in 1usize..8) {
        let mut random = Pcg64::seed_from_u64(seed);
        let (found, runs) = found(n, |_| random.random::<f64>() < 0.3);
        prop_assert!(runs.len() <= 30 * (1 << n) + 30);
        if let Found::Culprit(culprit) = found {
            prop_assert!(!culprit.set.is_empty());
        }
    }

    #[test]
    fn what_hides_and_shows_failures_at_will_yields_a_set_that_fails(seed in any::<u64>(), n in 1usize..9) {
        // A fixed truth without any order in it, but for the empty set.
        let fails = |on: &Set| {
            let bits = on.iter().fold(0u64, |bits, i| bits | 1 << i);
            bits != 0 && Pcg64::seed_from_u64(seed ^ (bits << 32)).random::<f64>() < 0.4
        };
        match found(n, fails).0 {
            Found::Culprit(culprit) => {
                prop_assert!(fails(&culprit.set));
                for &switch in culprit.set.iter().filter(|_| culprit.set.len() > 1) {
                    prop_assert!(!fails(&without(&culprit.set, switch)));
                }
            }
            Found::NothingFails => prop_assert!((0..n).all(|i| !fails(&set(&[i]))) && !fails(&(0..n).collect())),
            Found::BaselineFails => prop_assert!(false, "it never fails without a switch"),
        }
    }
}

/// How often of 200 times the search is right about a culprit that makes it fail at `rate` only.
fn right(culprit: &[usize], rate: f64, minimum: Minimum) -> usize {
    let truth = set(culprit);
    let is_right = |seed: &u64| {
        let mut random = Pcg64::seed_from_u64(*seed);
        let fails = |on: &Set| truth.is_subset(on) && random.random::<f64>() < rate;
        let found = search(&mut Made { fails, budget: usize::MAX, runs: vec![] }, 6, minimum, &mut Tallies::new());
        matches!(found, Ok(Found::Culprit(culprit)) if culprit.set == truth)
    };
    (0..200).filter(is_right).count()
}

#[test]
fn a_culprit_that_fails_now_and_then_is_found_the_more_often_the_more_runs_are_asked_for() {
    for (culprit, rate, with_two, with_five) in
        [(&[2][..], 0.9, 190, 199), (&[2], 0.7, 180, 196), (&[2], 0.5, 160, 190), (&[1, 4], 0.7, 165, 190)]
    {
        let right = [2, 5].map(|n| right(culprit, rate, Minimum { pass: n, fail: n }));
        assert!(right[0] >= with_two && right[1] >= with_five, "{culprit:?} at {rate}: {right:?}");
    }
}
