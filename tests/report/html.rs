use crate::samples;
use fused_xent::report::headline;
use fused_xent::report::html;
use fused_xent::report::model::Report;

fn render(reports: &[Report]) -> String {
    html::render(reports, &[])
}

#[test]
fn the_page_stands_alone() {
    let page = render(&[
        samples::agreeing(),
        samples::two_candidates(),
        samples::nonfinite(),
        samples::microbatches(16, &[2, 11]),
        samples::drawn(16),
    ]);
    for outside in ["<script", "http:", "https:", "src=", "@import", "url(", "<link", "onload", "javascript:"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("prefers-color-scheme: dark"));
    assert!(page.contains("xent-diff dumps/tiny --step 0 --candidate recorded"));
    for tag in [
        "section",
        "article",
        "table",
        "svg",
        "div",
        "dl",
        "p",
        "h1",
        "h2",
        "h3",
        "tr",
        "td",
        "th",
        "ul",
        "li",
        "a",
        "b",
        "text",
        "figure",
        "figcaption",
        "details",
        "summary",
        "pre",
        "code",
        "span",
        "small",
    ] {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn the_verdict_comes_first() {
    let report = samples::agreeing();
    let page = render(std::slice::from_ref(&report));
    let body = page.split("<body>").nth(1).unwrap().trim_start();
    let body = body.replace('\u{2060}', "");
    let expected = format!("<h1 id=\"dump-0\" class=\"agree\"><small>✓ agrees</small> <span>{}</span>", headline(&report));
    assert!(body.starts_with(&expected), "{body}");
}

#[test]
fn where_the_error_enters_is_told_and_tabled() {
    let page = render(&[samples::certain(), samples::unknown()]);
    for words in [
        "<h3>Where it enters</h3>",
        "at d_unembedding_label, 2.2e4× the floor",
        "<td>✓ lse and ✗ d_unembedding_label</td>",
        "d_unembedding and accumulated_d_unembedding have all of their error from d_unembedding_label",
        "with the reference&#39;s d_unembedding_label: d_unembedding 2.65× → 1.01×",
        "A factor per token, 0.820 to 1.31, on the lse part accounts for 99.1 % of it",
    ] {
        assert!(page.contains(words), "{words}");
    }
    assert!(page.contains("cause unknown. A factor per token"), "the headline of an unknown cause says what is seen");
}

#[test]
fn figures_are_drawn_and_stay_small() {
    let page = render(&[samples::drawn(64)]);
    assert!(page.len() < 500_000, "{}", page.len());
    for title in [
        "d_hidden of microbatch 11.</b> error over the floor",
        "d_unembedding of microbatch 0.</b> relative error of a row",
        "error of an element by the size of the gradient",
        "d_hidden by tiles of the logits.",
        "accounts for 97.0 % of the error",
        "Stages by microbatches",
        "Processes by microbatches",
    ] {
        assert!(page.contains(title), "{title}");
    }
    assert_eq!(page.matches("class=\"absent\"").count(), 1);
    assert!(!render(&[samples::microbatches(1, &[])]).contains("<figure"), "nothing to draw, no frame for it");
}

#[test]
fn figures_of_odd_values_are_drawn() {
    let mut report = samples::drawn(4);
    let tensor = &mut report.candidates[0].microbatches[2].tensors[3];
    let plots = tensor.plots.as_mut().unwrap();
    plots.profile.truncate(1);
    plots.profile[0].ratio = f32::INFINITY;
    plots.profile[0].worst = f32::NAN;
    plots.magnitude.iter_mut().for_each(|bin| bin.rms = 0.0);
    plots.hits.clear();
    for values in [vec![f32::NAN; 576], vec![], vec![f32::INFINITY; 576]] {
        report.candidates[0].crossing.as_mut().unwrap().maps[0].ratio = values;
        let page = render(std::slice::from_ref(&report));
        assert!(!page.contains("NaN ") && !page.contains("MNaN") && !page.contains("inf\""), "{page}");
    }
}

#[test]
fn text_is_escaped() {
    let mut report = samples::certain();
    let attack = "<img src=x onerror=\"alert('1')\">&";
    report.dump.path = attack.to_owned();
    report.dump.run_ids = vec![attack.to_owned(), "b".to_owned()];
    report.dump.interrupted = vec![attack.to_owned()];
    report.warnings = vec![attack.to_owned()];
    let candidate = &mut report.candidates[0];
    candidate.candidate = attack.to_owned();
    candidate.description = attack.to_owned();
    candidate.run_id = attack.to_owned();
    let tensor = &mut candidate.microbatches[0].tensors[3];
    tensor.name = attack.to_owned();
    tensor.reason = Some(attack.to_owned());
    tensor.worst.as_mut().unwrap().place = attack.to_owned();
    tensor.pattern.as_mut().unwrap().kind = attack.to_owned();
    candidate.first_divergence.as_mut().unwrap().stage = attack.to_owned();
    let rung = &mut candidate.substitution.as_mut().unwrap().rungs[0];
    rung.stage = attack.to_owned();
    rung.inputs = vec![samples::input(attack, false)];
    let finding = &mut candidate.findings[0];
    finding.tell_apart = vec![attack.to_owned()];
    finding.cause = attack.to_owned();
    finding.title = attack.to_owned();
    finding.evidence = attack.to_owned();
    finding.remedy = attack.to_owned();
    finding.parameters.insert(attack.to_owned(), attack.into());
    finding.indistinguishable_from = vec![attack.to_owned()];
    let page = render(&[report]);
    assert!(!page.contains("<img") && !page.contains("alert('"), "{page}");
    assert!(page.contains("&lt;img"));
}
