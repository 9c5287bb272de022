//! Draws figures, as SVG for pages and as PNG for files. The font is built in: no system library is asked for one.

use std::ops::Range;
use std::sync::OnceLock;

use epaint_default_fonts::UBUNTU_LIGHT;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::figure::{Axis, Content, Figure, Line, Span};

/// Pixels of a picture.
const SIZE: (u32, u32) = (960, 420);
/// Pixels of the legend.
const LEGEND: u32 = 230;
/// Letters of a label that fit there.
const LETTERS: usize = 32;
/// Lines with fewer points get dots.
const DOTTED: usize = 30;

/// Colours that are told apart by most eyes (after Okabe and Ito), then darker ones.
const COLOURS: [RGBColor; 16] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
    RGBColor(160, 60, 60),
    RGBColor(60, 60, 160),
    RGBColor(60, 130, 60),
    RGBColor(150, 110, 40),
    RGBColor(120, 60, 140),
    RGBColor(40, 140, 150),
    RGBColor(200, 140, 130),
    RGBColor(130, 160, 60),
    RGBColor(20, 20, 20),
];

/// A picture as the text of an `svg` element.
pub fn svg(figure: &Figure) -> Result<String, String> {
    ready()?;
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&root, figure).map_err(|error| error.to_string())?;
        root.present().map_err(|error| error.to_string())?;
    }
    Ok(text)
}

/// A picture as the bytes of a PNG file.
pub fn png(figure: &Figure) -> Result<Vec<u8>, String> {
    ready()?;
    let (wide, high) = SIZE;
    let mut pixels = vec![0; (wide * high * 3) as usize];
    {
        let root = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
        draw(&root, figure).map_err(|error| error.to_string())?;
        root.present().map_err(|error| error.to_string())?;
    }
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, wide, high);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
    written.map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Gives the drawing library its font, once.
fn ready() -> Result<(), String> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = REGISTERED.get_or_init(|| register_font("sans-serif", FontStyle::Normal, UBUNTU_LIGHT).is_ok());
    if *registered { Ok(()) } else { Err("the built-in font cannot be read".into()) }
}

type Area<B> = DrawingArea<B, Shift>;
type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

fn draw<B: DrawingBackend>(root: &Area<B>, figure: &Figure) -> Drawn<B> {
    root.fill(&WHITE)?;
    match &figure.content {
        Content::Lines(lines) => {
            let (left, right) = root.split_horizontally(SIZE.0 - LEGEND);
            legend(&right, lines)?;
            let x = range(&figure.x, lines.iter().flat_map(|line| line.points.iter().map(|point| point.0)));
            let y = range(&figure.y, lines.iter().flat_map(|line| line.points.iter().map(|point| point.1)));
            let [x_ticks, y_ticks] = [(&figure.x, &x), (&figure.y, &y)].map(|(axis, range)| ticks(axis, range));
            let mut chart = ChartBuilder::on(&left)
                .caption(&figure.title, ("sans-serif", 20))
                .margin(12)
                .x_label_area_size(42)
                .y_label_area_size(64)
                .build_cartesian_2d(Ruler::new(x, x_ticks), Ruler::new(y, y_ticks))?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .x_desc(&figure.x.label)
                .y_desc(&figure.y.label)
                .x_label_formatter(&|value| tick(&figure.x, *value))
                .y_label_formatter(&|value| tick(&figure.y, *value))
                .label_style(("sans-serif", 14))
                .draw()?;
            for (at, line) in lines.iter().enumerate() {
                let points: Vec<(f64, f64)> = line
                    .points
                    .iter()
                    .filter_map(|(x, y)| Some((placed(&figure.x, *x)?, placed(&figure.y, *y)?)))
                    .collect();
                if line.bound {
                    chart.draw_series(DashedLineSeries::new(points, 6, 4, BLACK.stroke_width(1)))?;
                    continue;
                }
                let colour = colour(at);
                if points.len() < DOTTED {
                    chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
                }
                chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
            }
        }
        Content::Bars(bars) => {
            let most = bars.iter().map(|(_, value)| *value).fold(0.0, f64::max);
            let number = bars.len() as f64;
            let mut chart = ChartBuilder::on(root)
                .caption(&figure.title, ("sans-serif", 20))
                .margin(12)
                .x_label_area_size(42)
                .y_label_area_size(LEGEND)
                .build_cartesian_2d(0.0..(most * 1.12).max(1e-9), -number..0.0)?;
            chart
                .configure_mesh()
                .disable_y_mesh()
                .light_line_style(TRANSPARENT)
                .y_labels(0)
                .x_desc(&figure.x.label)
                .x_label_formatter(&|value| tick(&figure.x, *value))
                .label_style(("sans-serif", 14))
                .draw()?;
            // bars get thinner, labels not smaller than can be read
            let text = (f64::from(SIZE.1 - 90) / number * 0.8).clamp(8.0, 15.0);
            for (at, (label, value)) in bars.iter().enumerate() {
                let (top, bottom) = (-(at as f64) - 0.15, -(at as f64) - 0.85);
                chart.draw_series([Rectangle::new([(0.0, top), (*value, bottom)], COLOURS[0].filled())])?;
                let middle = f64::midpoint(top, bottom);
                let style = ("sans-serif", text).into_font();
                let value_style = style.clone().color(&BLACK);
                chart.draw_series([Text::new(format!(" {}", short(*value)), (*value, middle + 0.25), value_style)])?;
                let (_, y) = chart.backend_coord(&(0.0, middle));
                let label: String = label.chars().take(LETTERS + 4).collect();
                root.draw(&Text::new(label, (14, y - (text / 2.0) as i32), style.color(&BLACK)))?;
            }
        }
        Content::Lanes(spans) => {
            let end = spans.iter().map(|span| span.over.1).fold(0.0, f64::max);
            let begin = spans.iter().map(|span| span.over.0).fold(end, f64::min);
            let x = begin..end.max(begin + 1e-6);
            let lanes = spans.iter().map(|span| span.lane).max().map_or(1, |lane| lane + 1);
            let mut chart = ChartBuilder::on(root)
                .caption(&figure.title, ("sans-serif", 20))
                .margin(12)
                .x_label_area_size(42)
                .y_label_area_size(52)
                .build_cartesian_2d(
                    Ruler::new(x.clone(), ticks(&figure.x, &x)),
                    // a worker's number is beside the middle of its lane
                    Ruler::new(-f64::from(lanes)..0.0, (0..lanes).map(|lane| -f64::from(lane) - 0.5).collect()),
                )?;
            chart
                .configure_mesh()
                .disable_mesh()
                .x_desc(&figure.x.label)
                .y_desc(&figure.y.label)
                .x_label_formatter(&|value| tick(&figure.x, *value))
                .y_label_formatter(&|value| short((-value - 0.5).round()))
                .label_style(("sans-serif", 14))
                .draw()?;
            for span in spans {
                chart.draw_series([lane(span)])?;
                if span.marked {
                    let (x, (top, bottom)) = (span.over.1, heights(span));
                    chart.draw_series([PathElement::new([(x, top), (x, bottom)], BLACK.stroke_width(1))])?;
                }
            }
        }
    }
    Ok(())
}

fn heights(span: &Span) -> (f64, f64) {
    (-f64::from(span.lane) - 0.1, -f64::from(span.lane) - 0.9)
}

fn lane(span: &Span) -> Rectangle<(f64, f64)> {
    let (top, bottom) = heights(span);
    let colour = COLOURS[0].mix(0.15 + 0.75 * span.weight.clamp(0.0, 1.0));
    Rectangle::new([(span.over.0, top), (span.over.1, bottom)], colour.filled())
}

fn legend<B: DrawingBackend>(area: &Area<B>, lines: &[Line]) -> Drawn<B> {
    let shown: Vec<(usize, &Line)> = lines.iter().enumerate().filter(|(_, line)| !line.label.is_empty()).collect();
    let step = (360.0 / shown.len().max(1) as f64).clamp(12.0, 24.0);
    for (row, (at, line)) in shown.into_iter().enumerate() {
        let y = (50.0 + row as f64 * step) as i32;
        let colour = if line.bound { BLACK } else { colour(at) };
        area.draw(&PathElement::new([(4, y), (24, y)], colour.stroke_width(if line.bound { 1 } else { 3 })))?;
        let label: String = line.label.chars().take(LETTERS).collect();
        area.draw(&Text::new(label, (30, y - 7), ("sans-serif", 13).into_font().color(&BLACK)))?;
    }
    Ok(())
}

fn colour(at: usize) -> RGBColor {
    COLOURS[at % COLOURS.len()]
}

/// Where a value is on an axis; `None`: nowhere.
fn placed(axis: &Axis, value: f64) -> Option<f64> {
    let value = if axis.log { (value > 0.0).then(|| value.log10())? } else { value };
    value.is_finite().then_some(value)
}

fn range(axis: &Axis, values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values
        .filter_map(|value| placed(axis, value))
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return 0.0..1.0;
    }
    // a plain axis begins at zero
    let low = if axis.log { low } else { low.min(0.0) };
    let room = (high - low) * 0.04;
    if room > 0.0 { low..high + room } else { low - 0.5..high + 0.5 }
}

/// A range with ticks of its own.
struct Ruler {
    range: RangedCoordf64,
    ticks: Vec<f64>,
}

impl Ruler {
    fn new(range: Range<f64>, ticks: Vec<f64>) -> Self {
        Self { range: range.into(), ticks }
    }
}

impl Ranged for Ruler {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.range.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.range()
    }
}

/// Where an axis has its ticks: at 1, 2 and 5 times a power of ten.
fn ticks(axis: &Axis, range: &Range<f64>) -> Vec<f64> {
    const MOST: f64 = 10.0;
    let width = range.end - range.start;
    let steps = (-9..=18).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)));
    let fine = |values: &[f64]| (3..=MOST as usize + 2).contains(&values.len());
    if axis.log {
        for digits in [&[1.0, 2.0, 3.0, 5.0, 7.0][..], &[1.0, 2.0, 5.0], &[1.0]] {
            let powers = range.start.floor() as i32..=range.end.ceil() as i32;
            let all = powers.flat_map(|power| digits.iter().map(move |digit: &f64| f64::from(power) + digit.log10()));
            let within: Vec<f64> = all.filter(|at| range.contains(at)).collect();
            if fine(&within) {
                return within;
            }
        }
    }
    // of a logarithm: less than a half of a power of ten, or very many
    let step = steps.into_iter().find(|step| width / step <= MOST).unwrap_or(width);
    let step = if axis.log && width > MOST { step.ceil() } else { step };
    let first = (range.start / step).ceil() as i64;
    (0..=MOST as i64 + 2).map(|at| (first + at) as f64 * step).filter(|at| range.contains(at)).collect()
}

fn tick(axis: &Axis, value: f64) -> String {
    short(if axis.log { 10f64.powf(value) } else { value })
}

/// Three digits that matter.
fn short(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let places = (2.0 - value.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.places$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Figure> {
        let figure = |content, log| Figure {
            name: "f".into(),
            title: "A <title> & more".into(),
            x: if log { Axis::log("x") } else { Axis::new("x") },
            y: Axis::new("y"),
            content,
        };
        let line =
            |points| Content::Lines(vec![Line::new("one", points), Line { bound: true, ..Line::new("two", vec![]) }]);
        let span = Span { lane: 1, over: (0.5, 2.0), weight: 0.5, marked: true };
        vec![
            figure(line(vec![(0.0, 1.0), (0.1, 2.0), (100.0, 3.0)]), true),
            figure(line(vec![(1.0, 1.0)]), false),
            figure(line(vec![]), true),
            figure(line((0..50).map(|at| (f64::from(at), f64::NAN)).collect()), false),
            figure(Content::Bars(vec![("a".into(), 2.0), ("b".into(), 0.0)]), false),
            figure(Content::Bars(vec![]), false),
            figure(Content::Lanes(vec![span]), false),
            figure(Content::Lanes(vec![]), false),
        ]
    }

    #[test]
    fn every_picture_is_drawn_whatever_is_in_it() {
        for figure in all() {
            let text = svg(&figure).expect("drawn");
            assert!(text.contains("<svg") && text.contains("&lt;title&gt; &amp; more"), "{text}");
            let bytes = png(&figure).expect("drawn");
            let decoder = png::Decoder::new(std::io::Cursor::new(&bytes));
            let reader = decoder.read_info().expect("a PNG");
            assert_eq!((reader.info().width, reader.info().height), SIZE);
        }
    }

    #[test]
    fn ticks_are_round_numbers() {
        let told = |axis: &Axis, range: Range<f64>| -> Vec<String> {
            ticks(axis, &range).iter().map(|at| tick(axis, *at)).collect()
        };
        let (plain, log) = (Axis::new("x"), Axis::log("x"));
        assert_eq!(told(&plain, 0.0..1.04), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(told(&plain, 170.0..300.0), ["180", "200", "220", "240", "260", "280"]);
        assert_eq!(told(&log, 0.6..1.65), ["5", "7", "10", "20", "30"]);
        assert_eq!(told(&log, -1.2..1.1), ["0.1", "0.2", "0.5", "1", "2", "5", "10"]);
        assert_eq!(told(&log, -3.0..4.5).len(), 8);
        for range in [0.0..1e-9, -300.0..300.0, 1.0..1.0 + 1e-12, 0.0..1e17, 2.3..2.31] {
            assert!(ticks(&plain, &range).len() <= 13 && ticks(&log, &range).len() <= 13, "{range:?}");
        }
    }

    #[test]
    fn labels_have_three_digits() {
        let pairs = [(0.0, "0"), (12.0, "12"), (0.012_345, "0.0123"), (1234.5, "1234"), (1.5, "1.5"), (100.0, "100")];
        for (value, expected) in pairs {
            assert_eq!(short(value), expected);
        }
    }
}
