//! The search for the faults that explain a case: every hypothesis on few rows, the best on more.

use super::bench::{Bench, Fit, Side, Trial};
use super::finding::{finding, to_tell_apart};
use super::hypotheses::{FILTER_TILES, Observed, THRESHOLDS, hypotheses};
use super::lse::SeenLse;
use super::shards::SeenShards;
use super::{Case, excerpts, significand};
use crate::diff::Progress;
use crate::diff::fault::{Fault, Touches};
use crate::diff::replay::{Counterfactual, Excerpt, Filter, Significand};
use crate::report::model::{Confidence, Finding};
use rayon::prelude::*;

/// A named fault explains at least this share of what was left before it.
const NAMED: f64 = 0.8;
/// The next best cause leaves at least this many times as much.
const CLEARLY: f64 = 2.0;
/// Fits this close are one fit.
pub(super) const EQUAL: f64 = 1.05;

/// Hypotheses that pass from few rows to more: those that leave at most this part of what is to be explained, …
const GOOD_PART: f64 = 0.6;
/// … at most so many times what the best leaves, …
const NEAR_THE_BEST: f64 = 16.0;
/// … and no fewer and no more than these.
const AT_LEAST: usize = 6;
const AT_MOST: usize = 24;

/// How many faults are tried as the first of two.
const MOST_FIRSTS: usize = 3;

/// Elements of K, over all microbatches, with which a hypothesis is tried on few rows in no time.
const LITTLE_WORK: usize = 1 << 19;

pub(super) struct Search<'a> {
    pub(super) case: &'a Case<'a>,
    progress: &'a dyn Progress,
    pub(super) excerpts: Vec<Excerpt<'a>>,
    /// Few rows, and all of the excerpts.
    pub(super) few: Bench<'a>,
    pub(super) more: Bench<'a>,
    lse: SeenLse,
    shards: SeenShards,
    significand: Option<Significand>,
}

impl<'a> Search<'a> {
    pub fn new(case: &'a Case<'a>, progress: &'a dyn Progress) -> Self {
        progress.begin("reading the rows that hypotheses are tried on", 1);
        let excerpts = excerpts::excerpts(case);
        let few = Bench::new(case, Some((&excerpts, excerpts::first_rows(case, &excerpts))), false);
        let more = Bench::new(case, Some((&excerpts, excerpts.iter().map(Excerpt::rows).collect())), true);
        progress.advance(1);
        let (lse, shards) = (SeenLse::new(case, &excerpts), SeenShards::new(case, &excerpts));
        let significand = significand::seen(case, &excerpts, &lse);
        Self { case, progress, excerpts, few, more, lse, shards, significand }
    }

    /// Every fault that could change what diverges, beside those chosen.
    pub fn hypotheses(&mut self, chosen: &[Fault]) -> Vec<Fault> {
        let Case { step, microbatches, accumulated, .. } = *self.case;
        let how = self.case.composed(chosen);
        self.learn([&how].into_iter());
        let factors = self.more.factors(&self.excerpts, &how);
        let (lse, shards, significand) = (&self.lse, &self.shards, self.significand);
        let faults = hypotheses(&Observed { step, microbatches, accumulated, lse, shards, significand, factors: &factors });
        faults.into_iter().filter(|fault| chosen.iter().all(|chosen| chosen.slug() != fault.slug())).collect()
    }

    /// Two faults that together come down to the floor, where none alone explains nearly all: one of those that explain a good
    /// part, and another on top of it.
    pub fn pair(&mut self, fits: &[(Fault, Fit)], base: &Fit) -> Option<(Vec<Fault>, Vec<Finding>, Fit)> {
        let mut firsts: Vec<&(Fault, Fit)> = vec![];
        for first in fits.iter().filter(|(_, fit)| fit.left() < GOOD_PART * base.left()) {
            if firsts.len() < MOST_FIRSTS && firsts.iter().all(|(other, _)| other.slug() != first.0.slug()) {
                firsts.push(first);
            }
        }
        for (first, fit) in firsts {
            let faults = self.hypotheses(&[*first]);
            let seconds = self.rank(faults, &[*first], fit);
            let Some((second, place)) = self.name(&seconds, fit, 2).filter(|(_, place)| seconds[*place].1.at_floor()) else {
                continue;
            };
            let mut found = finding(first, fits, fit, base, None);
            found.confidence = second.confidence;
            let (mut chosen, mut findings) = (vec![*first, seconds[place].0], vec![found, second]);
            let current = self.refine(&mut chosen, &mut findings, seconds[place].1.clone());
            return Some((chosen, findings, current));
        }
        None
    }

    /// What is to be explained.
    pub fn base(&self) -> Fit {
        self.more.base()
    }

    /// How each fault fits on top of those chosen, best first; those that clearly do not are left out. `current` is how these fit.
    pub fn rank(&mut self, faults: Vec<Fault>, chosen: &[Fault], current: &Fit) -> Vec<(Fault, Fit)> {
        let applied = self.case.composed(chosen);
        let faults = self.promising(faults, &applied, chosen.is_empty());
        self.progress.begin("comparing the best of them", faults.len() as u64);
        let mut fits = self.fits(faults, &applied, current, |s| &s.more);
        if let Some((Fault::GradientFilter(filter), fit)) = fits.first()
            && fit.left() < GOOD_PART * current.left()
        {
            let better = self.thresholds(*filter, &applied, current);
            fits.retain(|(fault, _)| better.iter().all(|(other, _)| other != fault));
            fits.extend(better);
            fits.sort_by(|a, b| a.1.left().total_cmp(&b.1.left()));
        }
        fits
    }

    /// Those of `faults` that fit a few rows best.
    fn promising(&mut self, faults: Vec<Fault>, applied: &Counterfactual, none_applied: bool) -> Vec<Fault> {
        self.progress.begin("testing the catalogue's faults", faults.len() as u64);
        let current = if none_applied { self.few.base() } else { self.fit(applied, Touches::ALL, None, |s| &s.few) };
        if current.left() == 0.0 {
            return faults;
        }
        // What needs to be learnt of all tokens is worth it only for what explains the rows of the sampled ones.
        let (mut cheap, costly): (Vec<Fault>, Vec<Fault>) = faults.into_iter().partition(|fault| {
            let trial = self.trial(fault, applied);
            !trial.touches.d_unembedding || self.excerpts.iter().all(|excerpt| excerpt.knows(&trial.how))
        });
        let bounded = self.bounded(costly, applied, &current);
        let rated = |(fault, fit): &(Fault, Fit)| (fit.left(), *fault);
        cheap.extend(self.filters(&bounded.iter().map(rated).collect::<Vec<_>>(), applied, &current));
        let mut fits = self.fits(cheap, applied, &current, |s| &s.few);
        let best = fits.first();
        let (left, at_floor) = best.map_or((f64::INFINITY, false), |(_, fit)| (fit.left(), fit.at_floor()));
        // Beside what comes down to the floor, only what does so too is worth it: in the rows of tokens, at least.
        let costly = bounded.iter().filter(|(_, fit)| !at_floor || fit.at_floor()).map(rated).collect();
        let costly = kept(costly, current.left(), left);
        fits.extend(self.fits(costly, applied, &current, |s| &s.few));
        kept(fits.into_iter().map(|(fault, fit)| (fit.left(), fault)).collect(), current.left(), f64::INFINITY)
    }

    /// How faults fit at the best, by the rows of tokens alone.
    fn bounded(&self, faults: Vec<Fault>, applied: &Counterfactual, current: &Fit) -> Vec<(Fault, Fit)> {
        let bounded = |fault: Fault| {
            let fit = self.few.fit(Some(&self.excerpts), &self.trial(&fault, applied), Some(current), Side::Tokens);
            self.progress.advance(1);
            (fault, fit)
        };
        faults.into_par_iter().map(bounded).collect()
    }

    /// Gradient filters with tiles of many tokens, where those with tiles of one explain a good part of the tokens' rows,
    /// or where it takes no time to try.
    fn filters(&mut self, bounded: &[(f64, Fault)], applied: &Counterfactual, current: &Fit) -> Vec<Fault> {
        let filters = bounded.iter().filter_map(|(left, fault)| match fault {
            Fault::GradientFilter(filter) => Some((*left, filter)),
            _ => None,
        });
        let there_is = self.few.left_of_tokens(current);
        let scouts = filters.min_by(|a, b| a.0.total_cmp(&b.0)).filter(|(left, _)| *left < GOOD_PART * there_is);
        let work = |m: &usize| self.case.step.microbatches[*m].problem.unembedding().len();
        let thresholds: Vec<f64> = match scouts {
            // More tokens in a tile: fewer tiles below a threshold, so that it is higher.
            Some((_, Filter { eps, .. })) => THRESHOLDS.into_iter().filter(|t| (0.5..200.0).contains(&(t / eps))).collect(),
            None if self.case.judged.iter().map(work).sum::<usize>() <= LITTLE_WORK => THRESHOLDS.to_vec(),
            None => return vec![],
        };
        let faults: Vec<Fault> = thresholds
            .into_iter()
            .flat_map(|eps| FILTER_TILES.map(|tokens| (eps, tokens)))
            .flat_map(|(eps, tokens)| {
                FILTER_TILES.map(|ids| Fault::GradientFilter(Filter { eps, tokens, ids, masked_count: false }))
            })
            .collect();
        let trials: Vec<Trial> = faults.iter().map(|fault| self.trial(fault, applied)).collect();
        self.learn(trials.iter().map(|trial| &trial.how));
        faults
    }

    fn trial(&self, fault: &Fault, applied: &Counterfactual) -> Trial {
        let mut how = *applied;
        fault.apply(&mut how, self.case.step);
        Trial { how, touches: fault.touches() }
    }

    /// The fits of faults on top of what is applied, best first.
    pub(super) fn fits(
        &mut self,
        faults: Vec<Fault>,
        applied: &Counterfactual,
        current: &Fit,
        bench: fn(&Self) -> &Bench<'a>,
    ) -> Vec<(Fault, Fit)> {
        let trials: Vec<(Fault, Trial)> = faults.into_iter().map(|fault| (fault, self.trial(&fault, applied))).collect();
        self.learn(trials.iter().filter(|(_, trial)| trial.touches.accumulated).map(|(_, trial)| &trial.how));
        let mut fits: Vec<(Fault, Fit)> = trials
            .into_par_iter()
            .map(|(fault, trial)| {
                let fit = bench(self).fit(Some(&self.excerpts), &trial, Some(current), Side::Both);
                self.progress.advance(1);
                (fault, fit)
            })
            .collect();
        fits.sort_by(|a, b| a.1.left().total_cmp(&b.1.left()));
        fits
    }

    pub(super) fn learn<'c>(&mut self, computations: impl Iterator<Item = &'c Counterfactual> + Clone) {
        self.excerpts.iter_mut().for_each(|excerpt| excerpt.learn(computations.clone()));
    }

    fn fit(&mut self, how: &Counterfactual, touches: Touches, otherwise: Option<&Fit>, bench: fn(&Self) -> &Bench<'a>) -> Fit {
        self.learn([how].into_iter());
        bench(self).fit(Some(&self.excerpts), &Trial { how: *how, touches }, otherwise, Side::Both)
    }

    /// How these faults fit together.
    fn fit_of(&mut self, faults: &[Fault]) -> Fit {
        let how = self.case.composed(faults);
        match faults {
            [only] => self.fit(&how, only.touches(), Some(&self.base()), |s| &s.more),
            _ => self.fit(&how, Touches::ALL, None, |s| &s.more),
        }
    }

    /// Fits the parameters of the faults found before again, now that another is known beside them.
    pub fn refine(&mut self, chosen: &mut [Fault], findings: &mut [Finding], mut current: Fit) -> Fit {
        for i in 0..chosen.len() - 1 {
            let others: Vec<Fault> = chosen.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, fault)| *fault).collect();
            let mut alike = self.hypotheses(&others);
            alike.retain(|fault| fault.slug() == chosen[i].slug());
            let without = self.fit_of(&others);
            if let Some((fault, fit)) = self.rank(alike, &others, &without).into_iter().next()
                && fit.left() < current.left()
            {
                (chosen[i], current) = (fault, fit);
            }
        }
        let base = self.base();
        for (i, finding) in findings.iter_mut().enumerate() {
            finding.explained = 1.0 - self.fit_of(&chosen[i..=i]).left() / base.left();
            finding.remaining_ratio = self.fit_of(&chosen[..=i]).ratio();
            finding.parameters = chosen[i].parameters();
        }
        current
    }

    /// The finding that the best fit makes, if it is good enough, and its place among `fits`, which come best first.
    pub fn name(&mut self, fits: &[(Fault, Fit)], current: &Fit, rank: usize) -> Option<(Finding, usize)> {
        let (_, best_fit) = fits.first()?;
        let best = best_fit.left();
        // Where the deviation is little more than the floor, no fault removes most of it: most of what is beyond counts.
        let explains = |what: fn(&Fit) -> f64| 1.0 - what(best_fit) / what(current) >= NAMED;
        let good = explains(Fit::left) || (best_fit.at_floor() && explains(Fit::beyond_floor));
        if !good {
            return None;
        }
        // Among equal fits the most specific fault is named; one that follows what was recorded gives way to any formula that fits.
        let (best_fault, _) = &fits[0];
        let alike = |fault: &Fault, fit: &Fit| {
            fit.left() <= best * EQUAL || (best_fault.is_generic() && fault.slug() == best_fault.slug() && fit.at_floor())
        };
        let (place, (fault, fit)) = fits
            .iter()
            .enumerate()
            .filter(|(_, (fault, fit))| alike(fault, fit))
            .min_by_key(|(_, (fault, _))| fault.is_generic())?;
        let left = fit.left();
        let equal = |f: &Fit| f.left() <= left * EQUAL || (f.at_floor() && f.left() <= left * CLEARLY);
        let mut same: Vec<String> = Vec::new();
        for (other, _) in fits.iter().filter(|(o, f)| o.slug() != fault.slug() && equal(f)) {
            if !same.contains(&other.slug().to_owned()) {
                same.push(other.slug().into());
            }
        }
        let runner_up = fits.iter().find(|(other, _)| other.slug() != fault.slug() && !same.contains(&other.slug().to_owned()));
        let clear = runner_up.is_none_or(|(_, other)| other.left() >= left * CLEARLY);
        if !clear && !fit.at_floor() {
            return None;
        }
        let confidence = match (fit.at_floor(), clear && same.is_empty()) {
            (true, true) => Confidence::Certain,
            (_, true) => Confidence::Likely,
            _ => Confidence::Possible,
        };
        let base = self.base();
        let alone = if rank == 1 { fit.clone() } else { self.fit_of(&[*fault]) };
        let explained = |fit: &Fit| 1.0 - fit.left() / base.left();
        let mut finding = finding(fault, fits, fit, current, runner_up.map(|(other, fit)| (other, fit, explained(fit))));
        (finding.rank, finding.confidence, finding.explained) = (rank, confidence, explained(&alone));
        if !same.is_empty() {
            let causes: Vec<&str> = std::iter::once(fault.slug()).chain(same.iter().map(String::as_str)).collect();
            finding.tell_apart = to_tell_apart(&causes);
        }
        finding.indistinguishable_from = same;
        Some((finding, place))
    }

    /// How the reference and the chosen faults fit on all rows that are judged, if those are more than the excerpts have; what
    /// the findings say of it is set right.
    pub fn on_all_rows(&self, chosen: &[Fault], findings: &mut [Finding], current: &Fit) -> Option<(Fit, Fit)> {
        let case = self.case;
        let whole = |place: usize| case.step.microbatches[case.judged[place]].problem.shape();
        let all_there = self.excerpts.iter().enumerate().all(|(place, excerpt)| {
            let (shape, sample) = (whole(place), excerpt.sample());
            case.truth(place).sample.is_some() || (sample.tokens().len(), sample.ids().len()) == (shape.tokens, shape.vocab)
        });
        let last = findings.last_mut().filter(|_| !all_there && current.near_floor())?;
        self.progress.begin("replaying it on all rows", 1);
        let bench = Bench::new(case, None, true);
        let base = bench.base();
        let touches = if let [only] = chosen { only.touches() } else { Touches::ALL };
        let fit = bench.fit(None, &Trial { how: case.composed(chosen), touches }, Some(&base), Side::Both);
        self.progress.advance(1);
        last.remaining_ratio = fit.ratio();
        if chosen.len() == 1 {
            last.explained = 1.0 - fit.left() / base.left();
        }
        if !fit.at_floor() && last.confidence == Confidence::Certain {
            last.confidence = Confidence::Likely;
        }
        Some((base, fit))
    }
}

/// The hypotheses that are worth more rows, given what each leaves, what there is, and what another is known to leave.
fn kept(mut rated: Vec<(f64, Fault)>, there_is: f64, another: f64) -> Vec<Fault> {
    rated.sort_by(|a, b| a.0.total_cmp(&b.0));
    let best = rated.first().map_or(another, |(left, _)| left.min(another));
    let most = (GOOD_PART * there_is).min(NEAR_THE_BEST * best);
    let good = rated.iter().take_while(|(left, _)| *left <= most).count();
    let fewest = if another.is_finite() { 0 } else { AT_LEAST };
    let number = good.clamp(fewest, AT_MOST).min(rated.len());
    let mut out: Vec<Fault> = rated.drain(..number).map(|(_, fault)| fault).collect();
    // Variants of one fault do not crowd out others: the best of each that is good, and at least one to compare with.
    for (left, fault) in rated {
        let new = out.iter().all(|kept| kept.slug() != fault.slug());
        let alone = fewest > 0 && out.iter().all(|kept| kept.slug() == out[0].slug());
        if new && (left <= most || alone) {
            out.push(fault);
        }
    }
    out
}
