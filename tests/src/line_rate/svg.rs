//! Plots of what a run found out: both axes logarithmic, each line named at its end.

use std::fmt::Write as _;

use super::report::whole;

/// A line of a plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Written at its end.
    pub name: String,
    /// From left to right; all above 0.
    pub points: Vec<(f64, f64)>,
    /// Whether it is there to compare with.
    pub dashed: bool,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 200.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 48.0;
/// Told apart also by those who see few colours.
const COLOURS: [&str; 6] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#7f7f7f",
];

/// Decades that an axis shows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Axis {
    from: i32,
    to: i32,
}

impl Axis {
    fn around(values: impl Iterator<Item = f64>) -> Self {
        let logs: Vec<f64> = values.map(f64::log10).collect();
        let least = logs.iter().copied().fold(f64::INFINITY, f64::min);
        let most = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (from, to) = (least.floor() as i32, most.ceil() as i32);
        Self {
            from,
            to: to.max(from + 1),
        }
    }

    /// Between 0 and 1.
    fn place(self, value: f64) -> f64 {
        (value.log10() - f64::from(self.from)) / f64::from(self.to - self.from)
    }

    fn decades(self) -> impl Iterator<Item = f64> {
        (self.from..=self.to).map(|power| 10f64.powi(power))
    }
}

/// Draws lines; `x` and `y` say what the axes are.
pub fn plot(title: &str, x: &str, y: &str, lines: &[Line]) -> String {
    let sound = |line: &&Line| {
        let mut points = line.points.iter();
        !line.points.is_empty() && points.all(|(x, y)| *x > 0.0 && *y > 0.0)
    };
    let lines: Vec<&Line> = lines.iter().filter(sound).collect();
    let points = || lines.iter().flat_map(|line| &line.points);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n"
    );
    text(&mut svg, (LEFT, 20.0), "start", "#000000", title);
    if points().next().is_none() {
        svg.push_str("</svg>\n");
        return svg;
    }
    let (across, up) = (
        Axis::around(points().map(|(x, _)| *x)),
        Axis::around(points().map(|(_, y)| *y)),
    );
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let at_x = |value: f64| LEFT + across.place(value) * (right - LEFT);
    let at_y = |value: f64| bottom - up.place(value) * (bottom - TOP);
    for value in across.decades() {
        let x = at_x(value);
        rule(&mut svg, (x, TOP), (x, bottom));
        text(
            &mut svg,
            (x, bottom + 16.0),
            "middle",
            "#000000",
            &mark(value),
        );
    }
    for value in up.decades() {
        let y = at_y(value);
        rule(&mut svg, (LEFT, y), (right, y));
        text(
            &mut svg,
            (LEFT - 6.0, y + 4.0),
            "end",
            "#000000",
            &mark(value),
        );
    }
    let middle = (LEFT + right) / 2.0;
    text(&mut svg, (middle, HEIGHT - 12.0), "middle", "#000000", x);
    text(&mut svg, (6.0, TOP - 16.0), "start", "#000000", y);
    // Names in the order of the lines' ends, kept from covering one another.
    let mut names: Vec<(f64, &str, &str)> = vec![];
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let places: Vec<String> = line
            .points
            .iter()
            .map(|(x, y)| format!("{:.1},{:.1}", at_x(*x), at_y(*y)))
            .collect();
        let dashes = if line.dashed {
            " stroke-dasharray=\"6 4\""
        } else {
            ""
        };
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes} points=\"{}\"/>",
            places.join(" ")
        );
        for (x, y) in &line.points {
            let (x, y) = (at_x(*x), at_y(*y));
            let _ = writeln!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"
            );
        }
        if let Some((_, y)) = line.points.last() {
            names.push((at_y(*y) + 4.0, &line.name, colour));
        }
    }
    names.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = f64::NEG_INFINITY;
    for (y, name, colour) in names {
        let y = y.max(free);
        text(&mut svg, (right + 10.0, y), "start", colour, name);
        free = y + 14.0;
    }
    svg.push_str("</svg>\n");
    svg
}

fn text(svg: &mut String, at: (f64, f64), anchor: &str, colour: &str, text: &str) {
    let (x, y) = at;
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>"
    );
}

fn rule(svg: &mut String, from: (f64, f64), to: (f64, f64)) {
    let _ = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"#dddddd\"/>",
        from.0, from.1, to.0, to.1
    );
}

fn mark(value: f64) -> String {
    if value >= 1.0 {
        whole(value as u64)
    } else {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_where_their_logarithms_are() {
        let line = Line {
            name: "a < b".to_owned(),
            points: vec![(1.0, 10.0), (100.0, 1000.0)],
            dashed: true,
        };
        let svg = plot("title", "x", "y", &[line]);
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        let ends = format!("points=\"{LEFT:.1},{bottom:.1} {right:.1},{TOP:.1}\"");
        assert!(svg.contains(&ends), "{svg}");
        assert!(svg.contains("a &lt; b") && svg.contains("stroke-dasharray"));
        for decade in [">1<", ">10<", ">100<", ">1 000<"] {
            assert!(svg.contains(decade), "{decade}");
        }
    }

    #[test]
    fn names_do_not_cover_one_another() {
        let line = |name: &str| Line {
            name: name.to_owned(),
            points: vec![(1.0, 10.0)],
            dashed: false,
        };
        let svg = plot("", "", "", &[line("one"), line("two")]);
        let height = |name: &str| {
            let text = svg
                .lines()
                .find(|l| l.ends_with(&format!(">{name}</text>")));
            let y = text.unwrap().split("y=\"").nth(1).unwrap();
            y.split('"').next().unwrap().parse::<f64>().unwrap()
        };
        assert_eq!(height("two") - height("one"), 14.0);
    }

    #[test]
    fn what_has_no_logarithm_is_left_out() {
        let line = Line {
            name: "nothing".to_owned(),
            points: vec![(1.0, -3.0)],
            dashed: false,
        };
        let svg = plot("title", "x", "y", &[line]);
        assert!(svg.ends_with("</svg>\n") && !svg.contains("nothing"));
    }
}
