//! A picture as data: what is drawn, not how.

/// A picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Its file's name without the ending.
    pub name: String,
    /// Over it.
    pub title: String,
    /// Along it.
    pub x: Axis,
    /// Up it.
    pub y: Axis,
    /// What is in it.
    pub content: Content,
}

/// An axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    /// What it measures, with its unit.
    pub label: String,
    /// Equal factors are equally far apart.
    pub log: bool,
}

/// What is drawn.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Lines over both axes, with dots where there are few points.
    Lines(Vec<Line>),
    /// A bar for each label; the x axis is their value.
    Bars(Vec<(String, f64)>),
    /// Spans along x, one lane above another; the y axis counts lanes.
    Lanes(Vec<Span>),
}

/// A line.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// In the legend.
    pub label: String,
    /// In order of x.
    pub points: Vec<(f64, f64)>,
    /// Drawn dashed: a bound, not a measurement.
    pub bound: bool,
}

/// A part of a lane.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// Which.
    pub lane: u32,
    /// From where to where.
    pub over: (f64, f64),
    /// How strongly it is coloured, 0 to 1.
    pub weight: f64,
    /// Its end is marked.
    pub marked: bool,
}

impl Axis {
    /// A plain one.
    pub fn new(label: &str) -> Self {
        Self { label: label.to_owned(), log: false }
    }

    /// A logarithmic one.
    pub fn log(label: &str) -> Self {
        Self { label: label.to_owned(), log: true }
    }
}

impl Line {
    /// A measured one.
    pub fn new(label: &str, points: Vec<(f64, f64)>) -> Self {
        Self { label: label.to_owned(), points, bound: false }
    }
}

impl Content {
    /// Whether there is nothing to see.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Lines(lines) => lines.iter().all(|line| line.points.is_empty()),
            Self::Bars(bars) => bars.is_empty(),
            Self::Lanes(spans) => spans.is_empty(),
        }
    }
}
