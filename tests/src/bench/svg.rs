//! Bar charts as SVG, by hand: a few rectangles need no library. Pure.

use std::fmt::Write as _;

use super::stats::{Spread, float, number};

/// One bar.
#[derive(Debug, Clone)]
pub struct Bar {
    /// What it is about.
    pub name: String,
    /// Its length, with the spread as a thin line.
    pub spread: Spread,
}

const ROW: f64 = 24.0;
const LEFT: f64 = 250.0;
const WIDTH: f64 = 380.0;

/// Bars below each other from a common left edge. `log`: each tenth of the width is a power of the same number; for what differs by
/// orders of magnitude.
#[must_use]
pub fn bars(title: &str, unit: &str, bars: &[Bar], log: bool) -> String {
    let most = bars.iter().map(|bar| bar.spread.most).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let scale = |value: f64| {
        let share = if log { (1.0 + value.max(0.0)).ln() / (1.0 + most).ln() } else { value / most };
        share.clamp(0.0, 1.0) * WIDTH
    };
    let height = 44.0 + ROW * float(bars.len());
    let full = LEFT + WIDTH + 150.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {full:.0} {height:.0}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"22\" font-weight=\"bold\">{}</text>\n",
        escaped(title)
    );
    for (row, bar) in bars.iter().enumerate() {
        let top = 36.0 + ROW * float(row);
        let (least, median, most) =
            (scale(bar.spread.least), scale(bar.spread.median), scale(bar.spread.most));
        let (base, middle) = (top + 13.0, top + 9.0);
        let _ = write!(
            svg,
            "<text x=\"{:.0}\" y=\"{base:.0}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LEFT:.0}\" y=\"{top:.0}\" width=\"{:.1}\" height=\"18\" fill=\"#4878a8\"/>\n\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.0}\" y2=\"{middle:.0}\" stroke=\"#222\" stroke-width=\"2\"/>\n\
             <text x=\"{:.1}\" y=\"{base:.0}\">{} {unit}</text>\n",
            LEFT - 8.0,
            escaped(&bar.name),
            median.max(1.0),
            LEFT + least,
            LEFT + most,
            LEFT + most.max(median) + 8.0,
            number(bar.spread.median),
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(name: &str, value: f64) -> Bar {
        Bar { name: name.into(), spread: Spread { median: value, least: value, most: value, count: 1 } }
    }

    #[test]
    fn the_longest_bar_has_the_whole_width_and_names_are_escaped() {
        let svg = bars("times", "s", &[bar("a -> b", 10.0), bar("c", 5.0)], false);
        assert!(svg.contains("width=\"380.0\"") && svg.contains("width=\"190.0\""), "{svg}");
        assert!(svg.contains("a -&gt; b"), "{svg}");
    }

    #[test]
    fn nothing_at_all_is_a_chart_too() {
        assert!(bars("times", "s", &[bar("a", 0.0)], true).ends_with("</svg>\n"));
    }
}
