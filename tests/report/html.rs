use crate::samples;
use fused_xent::report::headline;
use fused_xent::report::html::render;

#[test]
fn the_page_stands_alone() {
    let page =
        render(&[samples::agreeing(), samples::two_candidates(), samples::nonfinite(), samples::microbatches(16, &[2, 11])]);
    for outside in ["<script", "http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("prefers-color-scheme: dark"));
    assert!(page.contains("xent-diff dumps/tiny --step 0 --candidate recorded"));
    for tag in ["section", "article", "table", "svg", "div", "dl", "p", "h1", "tr", "td", "th", "ul", "li", "a"] {
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
    assert!(body.starts_with(&format!("<h1 id=\"dump-0\" class=\"agree\">{}", headline(&report))), "{body}");
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
    let finding = &mut candidate.findings[0];
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
