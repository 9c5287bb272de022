//! One page with everything: the table, the pictures, the command. It opens by itself and asks nobody for anything.

use std::fmt::Write;

use super::figure::Figure;
use super::plot;

const STYLE: &str = "body{font:15px/1.45 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}\
    pre{background:#f5f5f5;padding:1em;overflow-x:auto;font-size:13px}svg{max-width:100%;height:auto}\
    h1{font-size:22px}figure{margin:1em 0;border-top:1px solid #ddd}";

/// The page.
pub fn page(title: &str, command: &str, table: &str, figures: &[Figure]) -> Result<String, String> {
    let (title, command, table) = (escaped(title), escaped(command), escaped(table));
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<pre>{command}</pre>\n<pre>{table}</pre>\n"
    );
    for figure in figures {
        let drawn = plot::svg(figure)?;
        // Writing to a string cannot fail.
        let _ = writeln!(out, "<figure id=\"{}\">{}</figure>", escaped(&figure.name), drawn.trim());
    }
    out.push_str("</body></html>\n");
    Ok(out)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::figure::{Axis, Content};
    use super::*;

    #[test]
    fn a_page_holds_all_it_shows() {
        let figure = Figure {
            name: "f".into(),
            title: "t".into(),
            x: Axis::new("x"),
            y: Axis::new("y"),
            content: Content::Bars(vec![("<b>".into(), 1.0)]),
        };
        let page = page("a & b", "scls-router simulate", "one\ntwo", &[figure]).expect("drawn");
        assert!(page.contains("a &amp; b") && page.contains("<svg") && !page.contains("<b>"));
        // what a browser would fetch
        for link in ["src=", "href=", "url(", "@import", "<script"] {
            assert!(!page.contains(link), "{link}");
        }
    }
}
