//! The search: which sets of switches are run, in what order, how often, and what is believed after.
//!
//! Nothing here knows what a run is: a [`Bench`] makes one and says whether it failed. What is believed depends on the tallies
//! alone, so a search that is begun anew with the tallies of an earlier one goes on where that stopped.

use super::switch::Set;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a run is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// It must succeed with no switch on.
    AllOff,
    /// It must fail with all of them on.
    AllOn,
    /// Each switch alone.
    Alone,
    /// Fewer and fewer of those that fail together.
    Narrow,
    /// All but some: does it succeed without these?
    Without,
    /// Once more, of what the conclusion rests on.
    Confirm,
}

impl Step {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Step::AllOff => "all off",
            Step::AllOn => "all on",
            Step::Alone => "one alone",
            Step::Narrow => "narrow down",
            Step::Without => "leave out",
            Step::Confirm => "confirm",
        }
    }
}

/// Makes runs.
pub trait Bench {
    /// Why it cannot.
    type Stop;

    /// Whether a run with `on` on failed.
    ///
    /// # Errors
    /// No run could be made; the search ends.
    fn fails(&mut self, on: &Set, step: Step) -> Result<bool, Self::Stop>;
}

/// How the runs of a set ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs that succeeded.
    pub passes: usize,
    /// Runs that did not.
    pub failures: usize,
}

impl Tally {
    /// All of them.
    pub fn runs(self) -> usize {
        self.passes + self.failures
    }

    /// Counts a run.
    pub fn add(&mut self, failed: bool) {
        *(if failed { &mut self.failures } else { &mut self.passes }) += 1;
    }

    /// Whether they ended in different ways.
    pub fn is_mixed(self) -> bool {
        self.passes > 0 && self.failures > 0
    }

    /// The share that failed.
    pub fn rate(self) -> f64 {
        self.failures as f64 / self.runs().max(1) as f64
    }
}

/// The tallies of all sets.
pub type Tallies = BTreeMap<Set, Tally>;

/// How many runs it takes to believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Minimum {
    /// Successes with all switches off, and of every set that the conclusion rests on.
    pub pass: usize,
    /// Failures, likewise.
    pub fail: usize,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It does not always succeed with all switches off.
    BaselineFails,
    /// Neither all switches together nor one alone make it fail.
    NothingFails,
    /// A set of switches makes it fail.
    Culprit(Culprit),
}

/// Which switches make it fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Culprit {
    /// The set that fails, and no longer does when any one of it is left out.
    pub set: Set,
    /// Every switch that fails alone; if any, the first is the set.
    pub alone: Vec<usize>,
    /// Sets that are as small: without one of them, all the others succeed. None where all together succeed.
    pub cures: Vec<Set>,
}

/// A set that fails at some rate passes so many runs with at most this chance before it is believed to pass.
pub(super) const DOUBT: f64 = 0.05;
/// The same for sets that the conclusion rests on.
const LAST_DOUBT: f64 = 0.01;
/// No set is run more often for the sake of doubt.
const MOST: usize = 30;

/// Runs on `bench` what it takes to find the smallest set of `n` switches that fails and the smallest whose removal cures,
/// beyond what `tallies` hold.
///
/// # Errors
/// A run could not be made; `tallies` hold those that were.
pub fn search<B: Bench>(bench: &mut B, n: usize, minimum: Minimum, tallies: &mut Tallies) -> Result<Found, B::Stop> {
    let mut trial = Trial { bench, all: (0..n).collect(), minimum, tallies };
    // What a run shows late, such as that results vary, may put in doubt what was believed early: until nothing new is run.
    loop {
        let before = trial.runs();
        let found = trial.search()?;
        if trial.runs() == before {
            return Ok(found);
        }
    }
}

/// The runs in which a set must pass to be believed to, if it may fail as seldom as any that gave mixed results.
pub(super) fn passes_needed(tallies: &Tallies, doubt: f64) -> usize {
    let rate = lowest_rate(tallies);
    if rate >= 1.0 { 1 } else { (doubt.ln() / (-rate).ln_1p()).ceil().clamp(1.0, MOST as f64) as usize }
}

/// The rate of the set that fails most seldom of those that fail at all; 1 if none gave mixed results. As if one more run had
/// succeeded, for few runs tell a rate badly and to believe it too high is what harms.
pub(super) fn lowest_rate(tallies: &Tallies) -> f64 {
    let rate = |tally: &Tally| tally.failures as f64 / (tally.runs() + 1) as f64;
    tallies.values().filter(|tally| tally.is_mixed()).map(rate).fold(1.0, f64::min)
}

/// The smallest subset of `from` that `holds`, in the sense that it no longer does when any one element is taken out.
/// `from` is known to hold and the empty set not to. Delta debugging: A. Zeller and R. Hildebrandt, "Simplifying and isolating
/// failure-inducing input", IEEE TSE 28 (2002), algorithm ddmin.
fn minimise<E>(from: Set, mut holds: impl FnMut(&Set) -> Result<bool, E>) -> Result<Set, E> {
    let mut current: Vec<usize> = from.into_iter().collect();
    let mut parts = 2;
    while current.len() > 1 {
        let size = current.len().div_ceil(parts);
        let chunks: Vec<Set> = current.chunks(size).map(|chunk| chunk.iter().copied().collect()).collect();
        let rest = |chunk: &Set| current.iter().copied().filter(|i| !chunk.contains(i)).collect::<Set>();
        let mut smaller = None;
        for chunk in &chunks {
            if holds(chunk)? {
                smaller = Some((chunk.clone(), 2));
                break;
            }
        }
        if smaller.is_none() && chunks.len() > 2 {
            for chunk in &chunks {
                let rest = rest(chunk);
                if holds(&rest)? {
                    smaller = Some((rest, chunks.len() - 1));
                    break;
                }
            }
        }
        match smaller {
            Some((set, next)) => (current, parts) = (set.into_iter().collect(), next),
            None if size == 1 => break,
            None => parts = (2 * parts).min(current.len()),
        }
    }
    Ok(current.into_iter().collect())
}

struct Trial<'a, B> {
    bench: &'a mut B,
    all: Set,
    minimum: Minimum,
    tallies: &'a mut Tallies,
}

impl<B: Bench> Trial<'_, B> {
    fn search(&mut self) -> Result<Found, B::Stop> {
        self.confirm_success(&Set::new(), Step::AllOff)?;
        let minimum = self.minimum.pass;
        // The rate at which it fails is worth knowing.
        while self.tally(&Set::new()).runs() < minimum {
            self.run(&Set::new(), Step::AllOff)?;
        }
        if self.tally(&Set::new()).failures > 0 {
            return Ok(Found::BaselineFails);
        }
        let all = self.all.clone();
        self.confirm_failure(&all, Step::AllOn)?;
        let together = self.tally(&all).failures > 0;
        let mut alone = Vec::new();
        for switch in 0..all.len() {
            if self.fails(&Set::from([switch]), Step::Alone)? {
                alone.push(switch);
            }
        }
        let set = match alone.first() {
            Some(&first) => Set::from([first]),
            None if together => minimise(all.clone(), |set| self.fails(set, Step::Narrow))?,
            None => return Ok(Found::NothingFails),
        };
        let cures = if together { self.cures(&set, &alone)? } else { vec![] };
        let culprit = Culprit { set, alone, cures };
        self.confirm(&culprit)?;
        Ok(Found::Culprit(culprit))
    }

    /// The smallest sets without which all the others succeed: single switches of the culprit if any will do.
    fn cures(&mut self, culprit: &Set, alone: &[usize]) -> Result<Vec<Set>, B::Stop> {
        let all = self.all.clone();
        let without = |set: &Set| all.difference(set).copied().collect::<Set>();
        if alone.is_empty() {
            let mut single = Vec::new();
            for &switch in culprit {
                if !self.fails(&without(&Set::from([switch])), Step::Without)? {
                    single.push(Set::from([switch]));
                }
            }
            if !single.is_empty() {
                return Ok(single);
            }
        }
        let known: Set = culprit.iter().chain(alone).copied().collect();
        let from = if self.fails(&without(&known), Step::Without)? { all.clone() } else { known };
        Ok(vec![minimise(from, |set| Ok(!self.fails(&without(set), Step::Without)?))?])
    }

    /// Runs what the conclusion rests on often enough.
    fn confirm(&mut self, culprit: &Culprit) -> Result<(), B::Stop> {
        for set in culprit.alone.iter().map(|&switch| Set::from([switch])).chain([culprit.set.clone()]) {
            self.confirm_failure(&set, Step::Confirm)?;
        }
        for set in culprit.must_pass(&self.all) {
            self.confirm_success(&set, Step::Confirm)?;
        }
        Ok(())
    }

    fn confirm_success(&mut self, set: &Set, step: Step) -> Result<(), B::Stop> {
        while self.tally(set).failures == 0
            && self.tally(set).passes < self.minimum.pass.max(passes_needed(self.tallies, LAST_DOUBT))
        {
            self.run(set, step)?;
        }
        Ok(())
    }

    /// Stops where it has not failed in as many runs as it should fail, or fails too seldom.
    fn confirm_failure(&mut self, set: &Set, step: Step) -> Result<(), B::Stop> {
        let minimum = self.minimum.fail;
        loop {
            let tally = self.tally(set);
            let hopeless = tally.failures == 0 && tally.passes >= minimum;
            if tally.failures >= minimum || hopeless || tally.runs() >= MOST.max(minimum.saturating_mul(10)) {
                return Ok(());
            }
            self.run(set, step)?;
        }
    }

    /// Whether the set is believed to fail. One failure is enough, for without switches there was none.
    fn fails(&mut self, set: &Set, step: Step) -> Result<bool, B::Stop> {
        while self.tally(set).failures == 0 && self.tally(set).passes < passes_needed(self.tallies, DOUBT) {
            self.run(set, step)?;
        }
        Ok(self.tally(set).failures > 0)
    }

    fn tally(&self, set: &Set) -> Tally {
        self.tallies.get(set).copied().unwrap_or_default()
    }

    fn run(&mut self, set: &Set, step: Step) -> Result<(), B::Stop> {
        let failed = self.bench.fails(set, step)?;
        self.tallies.entry(set.clone()).or_default().add(failed);
        Ok(())
    }

    fn runs(&self) -> usize {
        self.tallies.values().map(|tally| tally.runs()).sum()
    }
}

impl Culprit {
    /// The sets whose success the conclusion rests on: the culprit without any one of it, and all switches without the cure.
    pub(super) fn must_pass(&self, all: &Set) -> Vec<Set> {
        let less_one = self.set.iter().map(|switch| self.set.iter().copied().filter(|i| i != switch).collect());
        let cured = self.cures.iter().map(|cure| all.difference(cure).copied().collect());
        less_one.chain(cured).collect()
    }
}
