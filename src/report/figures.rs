//! The page's figures: SVG by hand, readable without scripts, coloured by the page's own style.

use super::plots::{Crossing, CrossingMap, HitsPoint, MagnitudeBin, Span};
use super::text::{percent, times};
use std::fmt::Write;

/// Width of a figure that fills the page, and of one that fills half of it.
const WIDE: f64 = 960.0;
const HALF: f64 = 460.0;
/// Room at the left for the numbers of an axis, and below.
const LEFT: f64 = 46.0;
const BELOW: f64 = 34.0;

/// Ratios at which the colour of a heat map changes.
const LEVELS: [f64; 5] = [1.5, 5.0, 25.0, 250.0, 2500.0];

/// The class of a ratio's colour.
pub(super) fn heat(ratio: f64) -> usize {
    LEVELS.iter().filter(|level| ratio > **level).count()
}

/// One number line of a figure, in powers of ten.
struct Axis {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
}

impl Axis {
    /// From the smallest to the largest of `values` that are above 0, in whole decades, drawn between `start` and `end`.
    fn decades(values: impl Iterator<Item = f64>, start: f64, end: f64) -> Self {
        let (mut from, mut to) = (f64::INFINITY, f64::NEG_INFINITY);
        for decade in values.filter(|x| *x > 0.0 && x.is_finite()).map(f64::log10) {
            (from, to) = (from.min(decade), to.max(decade));
        }
        if from > to {
            (from, to) = (0.0, 1.0);
        }
        // A power of ten that was rounded is one still.
        let from = (from + 1e-9).floor();
        Self { from, to: (to - 1e-9).ceil().max(from + 1.0), start, end }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value.max(f64::MIN_POSITIVE).log10() - self.from) / (self.to - self.from);
        self.start + share.clamp(0.0, 1.0) * (self.end - self.start)
    }

    /// Some of its powers of ten.
    fn ticks(&self) -> impl Iterator<Item = (f64, String)> + '_ {
        let step = ((self.to - self.from) / 6.0).ceil().max(1.0) as usize;
        let label = |decade: i32| match decade {
            0..=3 => format!("{}", 10u32.pow(decade.unsigned_abs())),
            _ => format!("10{}", superscript(decade)),
        };
        (self.from as i32..=self.to as i32).step_by(step).map(move |decade| (self.at(10f64.powi(decade)), label(decade)))
    }
}

fn superscript(n: i32) -> String {
    n.to_string()
        .chars()
        .map(|c| {
            if c == '-' {
                '⁻'
            } else {
                ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'][c as usize - '0' as usize]
            }
        })
        .collect()
}

struct Svg {
    out: String,
    width: f64,
    height: f64,
}

impl Svg {
    fn new(width: f64, height: f64, label: &str) -> Self {
        let out = format!(
            "<svg viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\" aria-label=\"{label}\">"
        );
        Self { out, width, height }
    }

    fn path(&mut self, class: &str, d: &str) {
        if !d.is_empty() {
            self.out += &format!("<path class=\"{class}\" d=\"{d}\"/>");
        }
    }

    fn text(&mut self, class: &str, x: f64, y: f64, text: &str) {
        let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        self.out += &format!("<text{class} x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>");
    }

    /// Lines and numbers of the vertical axis.
    fn vertical(&mut self, axis: &Axis) {
        for (y, label) in axis.ticks() {
            self.path("grid", &format!("M{LEFT} {y:.1}H{}", self.width));
            self.text("end", LEFT - 6.0, y + 4.0, &label);
        }
    }

    /// Lines and numbers of the horizontal axis, and what it is.
    fn horizontal(&mut self, axis: &Axis, name: &str) {
        let bottom = self.height - BELOW;
        for (x, label) in axis.ticks() {
            self.path("grid", &format!("M{x:.1} 0V{bottom}"));
            self.text("mid", x, bottom + 14.0, &label);
        }
        self.text("end", self.width, self.height - 3.0, name);
    }

    fn finish(self) -> String {
        self.out + "</svg>"
    }
}

fn figure(class: &str, title: &str, caption: &str, body: &str) -> String {
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    format!("<figure{class}><figcaption><b>{title}</b> {caption}</figcaption>{body}</figure>\n")
}

/// The error along the rows of a tensor, over the floor: `what` names the tensor, `rows` what they are. Where the tensor
/// agrees, no row is marked: a single one may lie above the limit of all.
pub(super) fn profile(spans: &[Span], limit: f64, diverges: bool, what: &str, rows: &str) -> String {
    let height = 150.0;
    let bottom = height - BELOW;
    let Some(last) = spans.last() else { return String::new() };
    let all = spans.iter().map(|span| f64::from(span.worst)).chain([0.3, 9.0]);
    let y = Axis::decades(all.map(|ratio| ratio.max(0.1)), bottom, 6.0);
    let mut svg = Svg::new(WIDE, height, "error over floor along the rows");
    svg.vertical(&y);
    let width = (WIDE - LEFT) / spans.len() as f64;
    let (base, mut paths) = (y.at(1.0), [const { String::new() }; 4]);
    for (place, span) in spans.iter().enumerate() {
        let x = LEFT + place as f64 * width;
        let bar = |ratio: f32| {
            let (top, wide) = (y.at(f64::from(ratio)), width * 0.86);
            // At the floor there is a bar still.
            let (top, bottom) = if (top - base).abs() < 1.0 { (base - 1.0, base + 1.0) } else { (top, base) };
            format!("M{x:.1} {bottom:.1}V{top:.1}h{wide:.2}V{bottom:.1}z")
        };
        let bad = |ratio: f32| usize::from(diverges && f64::from(ratio) > limit);
        if span.worst > span.ratio {
            paths[bad(span.worst)] += &bar(span.worst);
        }
        if span.ratio > 0.0 {
            paths[2 + bad(span.ratio)] += &bar(span.ratio);
        }
    }
    for (class, path) in ["good faint", "bad faint", "good", "bad"].into_iter().zip(&paths) {
        svg.path(class, path);
    }
    svg.path("one", &format!("M{LEFT} {base:.1}H{WIDE}"));
    svg.path("limit", &format!("M{LEFT} {0:.1}H{WIDE}", y.at(limit)));
    let (first, of) = (spans[0].rows[0], last.rows[1]);
    for quarter in 0..=4 {
        let class = ["", "mid", "mid", "mid", "end"][quarter];
        let place = (spans.len() * quarter / 4).min(spans.len() - 1);
        let row = if quarter == 4 { of - 1 } else { spans[place].rows[0] };
        svg.text(class, LEFT + (WIDE - LEFT) * quarter as f64 / 4.0, bottom + 14.0, &row.to_string());
    }
    svg.text("end", WIDE, height - 3.0, rows);
    let each = (of - first).div_ceil(spans.len());
    let each = if each > 1 { format!("{each} rows a bar, the worst of them pale behind") } else { "one row a bar".to_owned() };
    let caption = format!("error over the floor; line: the floor, dashes: the limit of all, {}; {each}", times(limit));
    figure("wide", what, &caption, &svg.finish())
}

/// The relative error of rows of vocab ids by how often they are labels.
pub(super) fn hits(points: &[HitsPoint], diverges: bool, what: &str) -> String {
    const HEIGHT: f64 = 230.0;
    /// Where rows stand that are no label.
    const NONE: f64 = LEFT + 14.0;
    let bottom = HEIGHT - BELOW;
    let errors = points.iter().flat_map(|point| [point.error, point.floor]).map(f64::from);
    let y = Axis::decades(errors, bottom, 6.0);
    let x = Axis::decades(points.iter().map(|point| point.hits as f64).chain([1.0]), LEFT + 46.0, HALF - 18.0);
    let mut svg = Svg::new(HALF, HEIGHT, "relative error of a row of dK by the hits of its label");
    svg.vertical(&y);
    svg.horizontal(&x, "hits of the label");
    svg.text("mid", NONE, bottom + 14.0, "none");
    let mut dots = [const { String::new() }; 2];
    let mut floors: Vec<(f64, Vec<f32>)> = Vec::new();
    for (place, point) in points.iter().enumerate() {
        // Rows of equal hits are set a little apart.
        let apart = ((place * 7) % 13) as f64 - 6.0;
        let at = if point.hits == 0 { NONE + apart } else { x.at(point.hits as f64) + apart * 0.5 };
        let bad = diverges && f64::from(point.error) > 1.5 * f64::from(point.floor);
        write!(dots[usize::from(bad)], "M{at:.1} {:.1}h0", y.at(f64::from(point.error))).expect("writing to a string");
        let at = if point.hits == 0 { NONE } else { x.at(point.hits as f64) };
        match floors.last_mut() {
            Some((last, of)) if (at - *last).abs() < 6.0 => of.push(point.floor),
            _ => floors.push((at, vec![point.floor])),
        }
    }
    svg.path("dots good faint", &dots[0]);
    svg.path("dots bad faint", &dots[1]);
    let median = |mut of: Vec<f32>| {
        of.sort_by(f32::total_cmp);
        f64::from(of[of.len() / 2])
    };
    let line: Vec<(f64, f64)> = floors.into_iter().map(|(at, of)| (at, y.at(median(of)))).collect();
    svg.path("floor", &polyline(&line));
    let caption = "relative error of a row by how often its vocab id is a label; line: the floor";
    figure("", what, caption, &svg.finish())
}

/// The error of elements by the size of the gradient.
pub(super) fn magnitude(bins: &[MagnitudeBin], what: &str) -> String {
    const HEIGHT: f64 = 230.0;
    /// Elements far smaller than the largest are no longer drawn.
    const SMALLEST: f64 = 1e-9;
    let Some(last) = bins.last() else { return String::new() };
    let bins: Vec<&MagnitudeBin> = bins.iter().filter(|bin| bin.from >= SMALLEST * last.from).collect();
    let bottom = HEIGHT - BELOW;
    let middle = |bin: &MagnitudeBin| bin.from * std::f64::consts::SQRT_2;
    let least = last.bound * SMALLEST;
    let errors = bins.iter().flat_map(|bin| [bin.rms, bin.largest, bin.bound]).filter(|error| *error > least);
    let y = Axis::decades(errors, bottom, 6.0);
    let x = Axis::decades(bins.iter().flat_map(|bin| [bin.from, 2.0 * bin.from]), LEFT + 4.0, HALF - 18.0);
    let mut svg = Svg::new(HALF, HEIGHT, "error of an element by the magnitude of the gradient");
    svg.vertical(&y);
    svg.horizontal(&x, "|gradient|");
    let line = |of: fn(&MagnitudeBin) -> f64| {
        let points = bins.iter().filter(|bin| of(bin) > 0.0).map(|bin| (x.at(middle(bin)), y.at(of(bin))));
        polyline(&points.collect::<Vec<_>>())
    };
    svg.path("limit", &line(|bin| bin.bound));
    svg.path("largest", &line(|bin| bin.largest));
    svg.path("rms", &line(|bin| bin.rms));
    let caption = "error of an element by the size of the gradient: blue, root mean square; red, largest; dashes, what no honest \
                   computation exceeds";
    figure("", what, caption, &svg.finish())
}

fn polyline(points: &[(f64, f64)]) -> String {
    points.iter().enumerate().map(|(i, (x, y))| format!("{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' })).collect()
}

/// Where in the logits the error comes from, by vocab tile and token tile.
pub(super) fn crossing(crossing: &Crossing, map: &CrossingMap, what: &str) -> String {
    const HEIGHT: f64 = 300.0;
    let tiles = [0, 1].map(|axis| crossing.of[axis].div_ceil(crossing.tile[axis].max(1)));
    let (across, down) = ((HALF - LEFT) / tiles[1] as f64, (HEIGHT - BELOW - 4.0) / tiles[0] as f64);
    let mut svg = Svg::new(HALF, HEIGHT, "share of the error by token tile and vocab tile");
    let mut cells = vec![String::new(); LEVELS.len() + 1];
    for (place, ratio) in map.ratio.iter().enumerate() {
        let (x, y) = (LEFT + (place % tiles[1]) as f64 * across, 4.0 + (place / tiles[1]) as f64 * down);
        let (width, height) = (across - 1.0, down - 1.0);
        write!(cells[heat(f64::from(*ratio))], "M{x:.1} {y:.1}h{width:.1}v{height:.1}h-{width:.1}z")
            .expect("writing to a string");
    }
    let of_whole_tiles = map.explained >= 0.5;
    for (level, cells) in cells.iter().enumerate() {
        svg.path(&format!("h{level}{}", if of_whole_tiles { "" } else { " faint" }), cells);
    }
    let bottom = HEIGHT - BELOW;
    for axis in [0, 1] {
        let step = tiles[axis].div_ceil(4);
        for tile in (0..tiles[axis]).step_by(step) {
            let label = (tile * crossing.tile[axis]).to_string();
            if axis == 0 {
                svg.text("end", LEFT - 6.0, 4.0 + tile as f64 * down + 10.0, &label);
            } else {
                svg.text("", LEFT + tile as f64 * across, bottom + 12.0, &label);
            }
        }
    }
    svg.text("end", HALF, HEIGHT - 3.0, &format!("vocab id, {} a tile", crossing.tile[1]));
    svg.text("", 0.0, HEIGHT - 3.0, &format!("token, {} a tile", crossing.tile[0]));
    let caption = format!(
        "by token tile and vocab tile of microbatch {}: each tile's part of the gradient, fitted to the error, over the floor; accounts \
         for {} of the error{}",
        crossing.microbatch,
        percent(map.explained.max(0.0)),
        if of_whole_tiles { "" } else { ", which is not made of whole tiles" }
    );
    figure("", what, &caption, &svg.finish())
}

/// The colours of the heat maps.
pub(super) fn legend() -> String {
    let mut svg = Svg::new(WIDE, 30.0, "colours of the ratio to the floor");
    for level in 0..=LEVELS.len() {
        let x = level as f64 * 58.0;
        svg.path(&format!("h{level}"), &format!("M{x} 2h57v10h-57z"));
        if level > 0 {
            svg.text("mid", x, 25.0, &times(LEVELS[level - 1]).replace(".00", "").replace(".50", ".5").replace(".0", ""));
        }
    }
    svg.text("", 0.0, 25.0, "floor");
    format!("<figure class=\"wide\">{}</figure>\n", svg.finish())
}

/// A cell of a grid.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Tile {
    /// A ratio to the floor.
    Ratio(f64),
    /// It was not committed.
    Absent,
    /// It holds nothing of what was compared.
    Nothing,
}

/// Rows by microbatches.
pub(super) fn grid(title: &str, caption: &str, rows: &[(String, Vec<Tile>)], columns: &[usize]) -> String {
    const LINE: f64 = 19.0;
    const NAME: f64 = 190.0;
    let width = ((WIDE - NAME) / columns.len().max(1) as f64).clamp(3.0, 64.0);
    let numbers = width >= 44.0;
    let height = rows.len() as f64 * LINE + 20.0;
    let mut svg = Svg::new(WIDE, height, "ratio to the floor by microbatch");
    let every = (columns.len() as f64 * 34.0 / (WIDE - NAME)).ceil().max(1.0) as usize;
    for (place, m) in columns.iter().enumerate().step_by(every) {
        svg.text("mid", NAME + (place as f64 + 0.5) * width, 12.0, &format!("mb {m}"));
    }
    let mut paths = vec![String::new(); LEVELS.len() + 1];
    let (mut absent, mut texts) = (String::new(), Vec::new());
    for (line, (name, cells)) in rows.iter().enumerate() {
        let y = 18.0 + line as f64 * LINE;
        texts.push(("end", NAME - 10.0, y + 13.0, name.clone()));
        for (place, cell) in cells.iter().enumerate() {
            let (x, wide, high) = (NAME + place as f64 * width, (width - 2.0).max(1.0), LINE - 2.0);
            match cell {
                Tile::Ratio(ratio) => {
                    let level = heat(*ratio);
                    write!(paths[level], "M{x:.1} {y:.1}h{wide:.1}v{high:.1}h-{wide:.1}z").expect("writing to a string");
                    if numbers {
                        texts.push((if level < 4 { "mid cell" } else { "mid on" }, x + wide / 2.0, y + 13.0, times(*ratio)));
                    }
                }
                Tile::Absent => write!(absent, "M{x:.1} {y:.1}l{wide:.1} {high:.1}m0-{high:.1}l-{wide:.1} {high:.1}")
                    .expect("writing to a string"),
                Tile::Nothing => {}
            }
        }
    }
    for (level, path) in paths.iter().enumerate() {
        svg.path(&format!("h{level}"), path);
    }
    svg.path("absent", &absent);
    for (class, x, y, text) in texts {
        svg.text(class, x, y, &text);
    }
    figure("wide", title, caption, &svg.finish())
}

/// A bar of a tensor's ratio in decades above the floor, with its limit.
pub(super) fn bar(ratio: f64, limit: f64, agrees: bool) -> String {
    let mut grid = String::new();
    for decade in 0..BAR_DECADES {
        write!(grid, "M{:.1} 0V14", decade as f64 * DECADE + 0.5).expect("writing to a string");
    }
    let length = if ratio.is_nan() { BAR } else { (ratio.log10() * DECADE).clamp(2.0, BAR) };
    let limit = (limit.log10() * DECADE).clamp(0.0, BAR);
    let class = if agrees { "good" } else { "bad" };
    format!(
        "<svg width=\"{BAR}\" height=\"14\" viewBox=\"0 0 {BAR} 14\" preserveAspectRatio=\"none\"><path class=\"grid\" d=\"{grid}\"/><rect class=\"{class}\" x=\"0\" y=\"3\" width=\"{length:.1}\" \
         height=\"8\" rx=\"1.5\"/><path class=\"limit\" d=\"M{limit:.1} 0V14\"/></svg>"
    )
}

/// The heading of the bars' column.
pub(super) fn bar_axis(labels: &[&str]) -> String {
    let texts: String = labels
        .iter()
        .enumerate()
        .map(|(decade, label)| format!("<text x=\"{:.0}\" y=\"11\">{label}</text>", decade as f64 * DECADE + 1.0))
        .collect();
    format!("<svg width=\"{BAR}\" height=\"14\">{texts}</svg>")
}

/// Width of the bars, and of a factor of ten in them, in px.
const BAR: f64 = 320.0;
const DECADE: f64 = 40.0;
const BAR_DECADES: usize = 8;
