//! Pictures of lines over logarithmic axes.

use plotters::coord::Shift;
use plotters::prelude::*;
use std::error::Error;
use std::ops::Range;
use std::path::Path;

/// A name and its points.
pub(crate) type Series = (String, Vec<(f64, f64)>);

pub(crate) struct Panel {
    pub(crate) title: &'static str,
    pub(crate) series: Vec<Series>,
}

/// Two panels side by side.
pub(crate) fn pair(path: &Path, panels: [Panel; 2]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (1000, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(500);
    for (area, panel) in [left, right].into_iter().zip(&panels) {
        draw(area, panel)?;
    }
    root.present()?;
    Ok(())
}

/// The range of all numbers, widened by a factor of `room` either way: a logarithmic axis needs that if all are equal.
fn range(numbers: impl Iterator<Item = f64>, room: f64) -> Range<f64> {
    let range = numbers.fold(f64::INFINITY..0.0, |range, x| range.start.min(x)..range.end.max(x));
    range.start / room..range.end * room
}

fn draw(area: DrawingArea<SVGBackend<'_>, Shift>, panel: &Panel) -> Result<(), Box<dyn Error>> {
    let points = || panel.series.iter().flat_map(|(_, points)| points.iter().copied());
    let mut chart = ChartBuilder::on(&area)
        .caption(panel.title, ("sans-serif", 17))
        .margin(18)
        .x_label_area_size(30)
        .y_label_area_size(62)
        .build_cartesian_2d(
            range(points().map(|(x, _)| x), 1.0).log_scale().base(2.0),
            // Space above the highest line for the legend.
            range(points().map(|(_, y)| y), 2.0).log_scale(),
        )?;
    let label = |x: &f64| if *x < 1.0 { format!("{x}") } else { format!("{x:.0}") };
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT).x_labels(10).x_label_formatter(&label).y_label_formatter(&label).draw()?;
    for ((name, points), colour) in panel.series.iter().zip([BLUE, RED, GREEN, MAGENTA]) {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    let mut labels = chart.configure_series_labels();
    labels.position(SeriesLabelPosition::UpperLeft).border_style(BLACK).background_style(WHITE.mix(0.7)).draw()?;
    Ok(())
}
