//! Results as tables, JSON and plots.

use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// Samples of one quantity.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Samples(pub Vec<f64>);

impl Samples {
    /// Returns the median; with an even number of samples, the mean of the middle two.
    pub(crate) fn median(&self) -> f64 {
        let sorted = self.sorted();
        let (low, high) = ((sorted.len() - 1) / 2, sorted.len() / 2);
        f64::midpoint(sorted[low], sorted[high])
    }

    /// Returns the minimum.
    pub(crate) fn min(&self) -> f64 {
        self.sorted()[0]
    }

    /// Returns the maximum.
    pub(crate) fn max(&self) -> f64 {
        self.sorted()[self.0.len() - 1]
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

/// Formats a number with three significant digits.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        ..1.0 => 3,
        1.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

impl std::fmt::Display for Samples {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.len() {
            0 => f.write_str("-"),
            1 => f.write_str(&number(self.0[0])),
            _ => {
                let (median, min, max) = (self.median(), self.min(), self.max());
                write!(f, "{} ({}–{})", number(median), number(min), number(max))
            }
        }
    }
}

/// A table of results, with remarks.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Table {
    /// Name in file names.
    pub name: String,
    /// Title: what is measured, and where.
    pub title: String,
    /// Name of the rows, and the columns with their units.
    pub columns: Vec<String>,
    rows: Vec<(String, Vec<Samples>)>,
    /// Remarks.
    pub findings: Vec<String>,
}

impl Table {
    /// Creates a table without rows.
    pub(crate) fn new(name: &str, title: &str, columns: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            title: title.to_owned(),
            columns: columns.iter().map(ToString::to_string).collect(),
            ..Self::default()
        }
    }

    /// Adds one sample to each column of a row, and the row itself if it is new.
    pub(crate) fn add(&mut self, row: &str, values: &[f64]) {
        let known = self.rows.iter().position(|(name, _)| name == row);
        let index = known.unwrap_or_else(|| {
            let empty = vec![Samples::default(); values.len()];
            self.rows.push((row.to_owned(), empty));
            self.rows.len() - 1
        });
        eprintln!("{}: {row}: {values:.3?}", self.name);
        for (samples, &value) in self.rows[index].1.iter_mut().zip(values) {
            samples.0.push(value);
        }
    }

    /// Returns a column of a row, counted from 0 after the name.
    pub(crate) fn get(&self, row: &str, column: usize) -> &Samples {
        let found = self.rows.iter().find(|(name, _)| name == row);
        &found.expect("it was measured").1[column]
    }

    /// Adds a remark.
    pub(crate) fn find(&mut self, what: String) {
        self.findings.push(what);
    }

    fn markdown(&self) -> String {
        let mut text = format!("### {}\n\n| {} |\n", self.title, self.columns.join(" | "));
        text += &format!("|---|{}\n", "--:|".repeat(self.columns.len() - 1));
        for (name, cells) in &self.rows {
            let cells: Vec<_> = cells.iter().map(ToString::to_string).collect();
            let _ = writeln!(text, "| {name} | {} |", cells.join(" | "));
        }
        for finding in &self.findings {
            let _ = write!(text, "\n- {finding}");
        }
        text + "\n"
    }

    /// Draws a bar for each row: its length is the median of the column, a whisker spans minimum to maximum.
    pub(crate) fn bars(&self, path: &Path, column: usize) -> Result<(), Box<dyn Error>> {
        let rows = self.rows.len();
        let most = self.rows.iter().map(|(_, cells)| cells[column].max());
        let most = most.fold(0.0, f64::max) * 1.05;
        let height = 70 + 26 * u32::try_from(rows)?;
        let root = SVGBackend::new(path, (720, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(&self.title, ("sans-serif", 15))
            .margin(6)
            .x_label_area_size(34)
            .y_label_area_size(190)
            .build_cartesian_2d(0.0..most, (0..rows - 1).into_segmented())?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .x_desc(self.columns[column + 1].as_str())
            .y_label_formatter(&|at| match at {
                SegmentValue::CenterOf(row) => self
                    .rows
                    .get(rows - 1 - row)
                    .map_or_else(String::new, |(name, _)| name.clone()),
                _ => String::new(),
            })
            .draw()?;
        for (row, (name, cells)) in self.rows.iter().rev().enumerate() {
            let color = match name.contains("CRIU") {
                true => RGBColor(170, 170, 170),
                false => RGBColor(40, 110, 180),
            };
            let samples = &cells[column];
            let (low, high) = (SegmentValue::Exact(row), SegmentValue::Exact(row + 1));
            let mut bar = Rectangle::new([(0.0, low), (samples.median(), high)], color.filled());
            bar.set_margin(4, 4, 0, 0);
            chart.draw_series([bar])?;
            let middle = SegmentValue::CenterOf(row);
            let whisker = [(samples.min(), middle.clone()), (samples.max(), middle)];
            chart.draw_series([PathElement::new(whisker, BLACK.stroke_width(2))])?;
        }
        root.present()?;
        Ok(())
    }
}

/// A line in a plot: its name, and its points.
pub(crate) type Series = (String, Vec<(f64, f64)>);

/// Draws lines. `growth` uses a logarithmic axis and marks each point.
pub(crate) fn lines(
    path: &Path,
    title: &str,
    axes: (&str, &str),
    growth: bool,
    series: &[Series],
) -> Result<(), Box<dyn Error>> {
    let points = || series.iter().flat_map(|(_, points)| points);
    let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(f64::MIN, f64::max);
    let left = points().map(|point| point.0).fold(f64::MAX, f64::min);
    let (right, top) = (most(|point| point.0), most(|point| point.1) * 1.1);
    let root = SVGBackend::new(path, (720, 340)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut builder = ChartBuilder::on(&root);
    builder
        .caption(title, ("sans-serif", 15))
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(56);
    if growth {
        let x = (left..right * 1.1).log_scale();
        draw(
            &mut builder.build_cartesian_2d(x, 0.0..top)?,
            axes,
            true,
            series,
        )?;
    } else {
        draw(
            &mut builder.build_cartesian_2d(left..right, 0.0..top)?,
            axes,
            false,
            series,
        )?;
    }
    root.present()?;
    Ok(())
}

type Chart<'a, X> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, RangedCoordf64>>;

fn draw<'a, X>(
    chart: &mut Chart<'a, X>,
    (x, y): (&str, &str),
    dots: bool,
    series: &[Series],
) -> Result<(), Box<dyn Error>>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart.configure_mesh().x_desc(x).y_desc(y).draw()?;
    for (index, (name, points)) in series.iter().enumerate() {
        let style = Palette99::pick(index).stroke_width(2);
        let line = LineSeries::new(points.iter().copied(), style);
        let drawn = chart.draw_series(line)?;
        drawn
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        if dots {
            let dots = points
                .iter()
                .map(|&point| Circle::new(point, 3, style.filled()));
            chart.draw_series(dots)?;
        }
    }
    if series.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .draw()?;
    }
    Ok(())
}

/// Writes all tables: `results.json` and `results.md`.
pub(crate) fn write(out: &Path, machine: &str, tables: &[Table]) -> Result<(), Box<dyn Error>> {
    #[derive(Serialize)]
    struct Results<'a> {
        machine: &'a str,
        tables: &'a [Table],
    }
    let mut text =
        format!("Measured on: {machine}. Medians, in parentheses the least and the most.\n");
    for table in tables {
        let _ = write!(text, "\n{}", table.markdown());
    }
    fs::write(out.join("results.md"), text)?;
    let results = Results { machine, tables };
    fs::write(
        out.join("results.json"),
        serde_json::to_string_pretty(&results)?,
    )?;
    Ok(())
}
