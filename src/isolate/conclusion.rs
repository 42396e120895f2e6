//! What follows from the runs, and how sure it is.

use super::search::{Culprit, DOUBT, Found, Tallies, Tally, lowest_rate, passes_needed};
use super::switch::{Set, names};
use super::{Experiment, Outcome, Run};
use crate::report::text::{list, percent};
use serde::{Deserialize, Serialize};

/// The end of the search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A set of switches makes the command fail.
    Culprit,
    /// Nothing fails.
    NothingFails,
    /// The command fails without any switch: there is nothing to be found among them.
    BaselineFails,
    /// The command fails now and then without any switch: no failure can be laid to one.
    BaselineVaries,
}

/// How sure the conclusion is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confidence {
    /// Every set always ended the same way, and chance does this less than once in a hundred times.
    Certain,
    /// Chance does it less than once in twenty times.
    Likely,
    /// More runs are needed.
    Possible,
}

impl Confidence {
    /// In one word.
    pub fn word(self) -> &'static str {
        match self {
            Confidence::Certain => "certain",
            Confidence::Likely => "likely",
            Confidence::Possible => "possible",
        }
    }
}

/// What follows from the runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Conclusion {
    /// How the search ended.
    pub verdict: Verdict,
    /// In one sentence, with the runs counted.
    pub sentence: String,
    /// The smallest set that fails.
    pub culprit: Vec<String>,
    /// Every switch that fails alone.
    pub alone: Vec<String>,
    /// Sets of equal size, each of which, left out, cures.
    pub cures: Vec<Vec<String>>,
    /// The cure in words.
    pub cure: Option<String>,
    /// How sure that is, where there is a culprit.
    pub confidence: Option<Confidence>,
    /// Why it is no surer, and no less.
    pub grounds: Option<String>,
    /// What a reader should know beside it.
    pub notes: Vec<String>,
    /// Each set that was run.
    pub sets: Vec<Tried>,
}

/// A set that was run.
#[derive(Clone, Debug, PartialEq)]
pub struct Tried {
    /// Names of the switches that were on.
    pub on: Vec<String>,
    /// How its runs ended.
    pub tally: Tally,
}

/// What the conclusion is drawn from.
struct Evidence<'a> {
    experiment: &'a Experiment,
    tallies: &'a Tallies,
    runs: &'a [Run],
    all: Set,
}

impl Conclusion {
    /// Draws it.
    pub(super) fn of(found: &Found, experiment: &Experiment, tallies: &Tallies, runs: &[Run]) -> Self {
        let evidence = Evidence { experiment, tallies, runs, all: (0..experiment.switches.len()).collect() };
        let mut conclusion = evidence.without_culprit(found);
        if let Found::Culprit(culprit) = found {
            evidence.accuse(culprit, &mut conclusion);
        }
        evidence.notes(&mut conclusion.notes);
        conclusion
    }
}

impl Evidence<'_> {
    fn without_culprit(&self, found: &Found) -> Conclusion {
        let (off, on) = (self.tally(&Set::new()), self.tally(&self.all));
        let (verdict, sentence) = match found {
            Found::BaselineFails if off.passes == 0 => {
                (Verdict::BaselineFails, format!("It fails with all switches off, in {} of {} runs.", off.failures, off.runs()))
            }
            Found::BaselineFails => {
                let text = format!("It fails now and then with all switches off, in {} of {} runs.", off.failures, off.runs());
                (Verdict::BaselineVaries, text)
            }
            _ => {
                let text =
                    format!("Nothing fails: with all switches on, {0} of {0} runs succeed, and with each alone.", on.runs());
                (Verdict::NothingFails, text)
            }
        };
        let tried = |(set, &tally): (&Set, &Tally)| Tried { on: self.list(set), tally };
        let sets = self.tallies.iter().map(tried).collect();
        Conclusion {
            verdict,
            sentence,
            culprit: vec![],
            alone: vec![],
            cures: vec![],
            cure: None,
            confidence: None,
            grounds: None,
            notes: vec![],
            sets,
        }
    }

    fn accuse(&self, culprit: &Culprit, conclusion: &mut Conclusion) {
        let known = |on: &Set| culprit.set.is_subset(on) || culprit.alone.iter().any(|switch| on.contains(switch));
        let (with, without) = self.divide(known);
        let counted = |tally: Tally, n: usize| format!("{n} of {} runs", tally.runs());
        let (who, it) = match (&culprit.alone[..], culprit.set.len()) {
            ([_], _) => (format!("{} makes it fail", names(&culprit.set, &self.experiment.switches)), "it"),
            ([], _) => (format!("{} together make it fail, and no fewer of them do", list(&self.list(&culprit.set))), "them"),
            (alone, _) => {
                let alone: Set = alone.iter().copied().collect();
                (format!("{} each make it fail alone", list(&self.list(&alone))), "any of them")
            }
        };
        conclusion.verdict = Verdict::Culprit;
        conclusion.sentence = format!(
            "{who}: {} with {it} on fail, {} without succeed.",
            counted(with, with.failures),
            counted(without, without.passes)
        );
        conclusion.culprit = self.list(&culprit.set);
        conclusion.alone = culprit.alone.iter().map(|&i| self.experiment.switches[i].name.clone()).collect();
        conclusion.cures = culprit.cures.iter().map(|cure| self.list(cure)).collect();
        conclusion.cure = Some(self.cure(culprit));
        if without.failures > 0 {
            conclusion.notes.push(format!(
                "{} of the runs without {it} fail as well: another set of switches makes it fail too; leave the first out and \
                 isolate again",
                without.failures
            ));
        }
        let (confidence, grounds) = self.sureness(culprit, with, without);
        (conclusion.confidence, conclusion.grounds) = (Some(confidence), Some(grounds));
    }

    fn cure(&self, culprit: &Culprit) -> String {
        if culprit.cures.is_empty() {
            return "none is needed with all switches on, which succeeds: another switch hides the failure".to_owned();
        }
        let choice = |cure: &Set| {
            let tally = self.tally(&self.all.difference(cure).copied().collect());
            format!("{} (then {} of {} runs succeed)", list(&self.list(cure)), tally.passes, tally.runs())
        };
        format!("leave out {}", culprit.cures.iter().map(choice).collect::<Vec<_>>().join(" or "))
    }

    fn sureness(&self, culprit: &Culprit, with: Tally, without: Tally) -> (Confidence, String) {
        let rate = lowest_rate(self.tallies);
        // A set that fails at that rate may have passed by luck.
        let luck = |set: &Set| (1.0 - rate).powi(self.tally(set).passes as i32);
        let doubt: f64 = if rate < 1.0 { culprit.must_pass(&self.all).iter().map(luck).sum() } else { 0.0 };
        let chance = chance(with, without);
        let confirmed = self.tally(&culprit.set).failures >= self.experiment.minimum.fail;
        let clean = rate >= 1.0 && without.failures == 0 && self.hidden().is_none();
        let odds = |p: f64| {
            if p > 1e-6 { format!("1 time in {:.0}", 1.0 / p) } else { "less than 1 time in a million".to_owned() }
        };
        let mut grounds = format!("if it had nothing to do with the failures, runs would fall out so {}", odds(chance));
        if rate < 1.0 {
            grounds += &format!(
                "; results vary, and a set that fails as seldom as {} would pass for good {}",
                percent(rate),
                odds(doubt.min(1.0))
            );
        } else {
            grounds += "; no set of switches gave different results";
        }
        let confidence = match chance.max(doubt) {
            worst if worst <= 0.01 && clean && confirmed => Confidence::Certain,
            worst if worst <= 0.05 && confirmed && self.hidden().is_none() => Confidence::Likely,
            _ => Confidence::Possible,
        };
        if !confirmed {
            grounds += &format!("; {} did not fail again in as many runs as asked for", list(&self.list(&culprit.set)));
        }
        if confidence != Confidence::Certain && clean {
            grounds += "; more runs would make it surer (--min-pass, --min-fail)";
        }
        (confidence, grounds)
    }

    /// A set that fails though a larger one does not.
    fn hidden(&self) -> Option<(&Set, &Set)> {
        let needed = passes_needed(self.tallies, DOUBT);
        let passes = |tally: &Tally| tally.failures == 0 && tally.passes >= needed;
        let mut fail = self.tallies.iter().filter(|(_, tally)| tally.failures > 0).map(|(set, _)| set);
        let pass: Vec<&Set> = self.tallies.iter().filter(|(_, tally)| passes(tally)).map(|(set, _)| set).collect();
        fail.find_map(|small| pass.iter().find(|large| small.is_subset(large)).map(|large| (small, *large)))
    }

    fn notes(&self, notes: &mut Vec<String>) {
        let name = |set: &Set| names(set, &self.experiment.switches);
        for (set, tally) in self.tallies.iter().filter(|(_, tally)| tally.is_mixed()) {
            notes.push(format!(
                "not deterministic: with {} on, {} of {} runs fail ({})",
                name(set),
                tally.failures,
                tally.runs(),
                percent(tally.rate())
            ));
        }
        if let Some((small, large)) = self.hidden() {
            notes.push(format!(
                "not monotone: it fails with {} on, but not with {}: a switch hides the failure",
                name(small),
                name(large)
            ));
        }
        let kinds = self.kinds();
        if let [(first, in_first), .., (last, in_last)] = &kinds[..] {
            notes.push(format!(
                "failures differ: {first} in run {in_first}, {last} in run {in_last}; perhaps they have different causes, which \
                 --failure-pattern and --success-pattern can tell apart"
            ));
        }
        let mut of = |filter: &dyn Fn(&Run) -> bool, what: &str| {
            let runs: Vec<String> = self.runs.iter().filter(|run| filter(run)).map(|run| run.number.to_string()).collect();
            if !runs.is_empty() {
                notes.push(format!("run{} {} {what}", if runs.len() > 1 { "s" } else { "" }, list(&runs)));
            }
        };
        of(
            &|run| self.experiment.is_perhaps_slow(run),
            "were still putting out something when time was up: perhaps only slow; raise --timeout",
        );
        of(&|run| run.left_behind, "left a process behind, outside the process group, that still ran afterwards");
    }

    /// The ways in which runs failed, each with the first run that did.
    fn kinds(&self) -> Vec<(String, usize)> {
        let mut kinds: Vec<(String, usize)> = Vec::new();
        for run in self.runs.iter().filter(|run| run.outcome != Outcome::Success) {
            let kind = match run.outcome {
                // Its times and lines are never the same.
                Outcome::Hang => "hang".to_owned(),
                _ => run.reason.split(": ").next().unwrap_or_default().to_owned(),
            };
            if !kinds.iter().any(|(known, _)| *known == kind) {
                kinds.push((kind, run.number));
            }
        }
        kinds
    }

    /// The runs of sets that `known` holds of, and the others.
    fn divide(&self, known: impl Fn(&Set) -> bool) -> (Tally, Tally) {
        let mut sums = [Tally::default(); 2];
        for (set, tally) in self.tallies {
            let sum = &mut sums[usize::from(!known(set))];
            sum.passes += tally.passes;
            sum.failures += tally.failures;
        }
        (sums[0], sums[1])
    }

    fn tally(&self, set: &Set) -> Tally {
        self.tallies.get(set).copied().unwrap_or_default()
    }

    fn list(&self, set: &Set) -> Vec<String> {
        set.iter().map(|&i| self.experiment.switches[i].name.clone()).collect()
    }
}

/// The chance that, had the division nothing to do with the outcomes, at least as many of all failures would fall to `with`:
/// Fisher's exact test, R. A. Fisher, "Statistical Methods for Research Workers" (1925), section 21.02.
fn chance(with: Tally, without: Tally) -> f64 {
    let (n, drawn, failures) = (with.runs() + without.runs(), with.runs(), with.failures + without.failures);
    let ln_choose = |n: usize, k: usize| (0..k).map(|i| ((n - i) as f64 / (i + 1) as f64).ln()).sum::<f64>();
    let of = |k: usize| ln_choose(failures, k) + ln_choose(n - failures, drawn - k) - ln_choose(n, drawn);
    (with.failures..=drawn.min(failures)).filter(|&k| drawn - k <= n - failures).map(|k| of(k).exp()).sum::<f64>().min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isolate::search::{Bench, Minimum, Step, search};
    use crate::isolate::{Setting, Switch};
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64;
    use std::time::Duration;

    /// Fails now and then with the switches of `truth` on.
    struct Flaky {
        truth: Set,
        rate: f64,
        random: Pcg64,
    }

    impl Bench for Flaky {
        type Stop = ();

        fn fails(&mut self, on: &Set, _: Step) -> Result<bool, ()> {
            Ok(self.truth.is_subset(on) && self.random.random::<f64>() < self.rate)
        }
    }

    #[test]
    fn what_is_certain_is_right() {
        let switch = |i: usize| Switch { name: format!("s{i}"), settings: vec![Setting::Arg("-x".into())] };
        let minimum = Minimum { pass: 2, fail: 2 };
        let experiment = Experiment {
            command: "true".into(),
            switches: (0..6).map(switch).collect(),
            timeout: Duration::from_secs(1),
            silence: None,
            success: None,
            failure: None,
            minimum,
        };
        for (truth, rate) in [(&[2][..], 0.9), (&[2], 0.7), (&[2], 0.5), (&[1, 4], 0.8)] {
            let truth: Set = truth.iter().copied().collect();
            let mut counts = [0; 2];
            for seed in 0..500 {
                let mut tallies = Tallies::new();
                let mut bench = Flaky { truth: truth.clone(), rate, random: Pcg64::seed_from_u64(seed) };
                let found = search(&mut bench, 6, minimum, &mut tallies).unwrap();
                let conclusion = Conclusion::of(&found, &experiment, &tallies, &[]);
                let right = matches!(&found, Found::Culprit(culprit) if culprit.set == truth);
                if !right && conclusion.verdict == Verdict::Culprit {
                    counts[0] += usize::from(conclusion.confidence == Some(Confidence::Certain));
                    counts[1] += usize::from(conclusion.confidence == Some(Confidence::Likely));
                }
            }
            assert!(counts[0] <= 5 && counts[1] <= 25, "{truth:?} at {rate}: {counts:?} wrong of 500");
        }
    }

    #[test]
    fn chance_is_that_of_fishers_table() {
        let tally = |passes, failures| Tally { passes, failures };
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12 * b, "{a} is not {b}");
        close(chance(tally(0, 2), tally(2, 0)), 1.0 / 6.0);
        close(chance(tally(0, 4), tally(4, 0)), 1.0 / 70.0);
        close(chance(tally(0, 6), tally(6, 0)), 1.0 / 924.0);
        // The lady tasting tea: three of four right.
        close(chance(tally(1, 3), tally(3, 1)), 17.0 / 70.0);
        close(chance(tally(2, 2), tally(2, 2)), 53.0 / 70.0);
        close(chance(tally(0, 3), tally(0, 0)), 1.0);
        close(chance(tally(3, 0), tally(0, 3)), 1.0);
    }
}
