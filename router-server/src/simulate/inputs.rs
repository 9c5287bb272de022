//! Files and built-in names: traces and devices. All that is read of a disk is read here.

use std::io::Read;
use std::path::Path;

use router_sim::{Device, Trace, rival};

use super::args::Asked;
use super::names::Scheduler;
use super::plan::{above_zero, bounded, pair, whole};

/// Built-in names of generated requests.
const GENERATED: &str = "synthetic-";

/// Bytes of a trace: the longest that is published has a third of it.
const MOST_BYTES: u64 = 4 << 30;

/// Requests to be run, as they were recorded or are to be drawn.
#[derive(Debug)]
pub struct Source {
    /// As in reports: the file without its folder and endings, or the generator's name.
    pub name: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Read of a file; and in how many copies it is to run, where that is said.
    Recorded(Trace, Option<u32>),
    /// Drawn anew for each seed: so many a second, for so many seconds.
    Generated(f64, f64),
}

impl Source {
    /// At so many times its rate, as this seed has it: arrivals shifted a little, or all drawn.
    pub fn scaled(&self, rate_scale: f64, seed: u64) -> Result<Trace, String> {
        let scaled = match &self.kind {
            Kind::Recorded(trace, None) => trace.jittered(seed).at_rate(rate_scale, seed),
            Kind::Recorded(trace, Some(copies)) => trace.jittered(seed).in_copies(rate_scale, *copies, seed),
            Kind::Generated(rate, seconds) => Trace::synthetic(&self.name, rate * rate_scale, *seconds, seed),
        };
        scaled.map_err(line)
    }

    /// How many requests that is, about.
    pub fn requests_at(&self, rate_scale: f64) -> f64 {
        match &self.kind {
            Kind::Recorded(trace, Some(copies)) => trace.requests.len() as f64 * f64::from(*copies),
            // more than 2 or 4 times as fast are copies
            Kind::Recorded(trace, None) => {
                let turns = trace.requests.iter().any(|request| request.session.is_some());
                trace.requests.len() as f64 * (rate_scale / if turns { 2.0 } else { 4.0 }).ceil().max(1.0)
            }
            Kind::Generated(rate, seconds) => rate * seconds * rate_scale,
        }
    }

    /// As it was recorded, where it was.
    pub fn recorded(&self) -> Option<&Trace> {
        match &self.kind {
            Kind::Recorded(trace, _) => Some(trace),
            Kind::Generated(..) => None,
        }
    }
}

/// What is asked for, read and cut to its window.
pub fn sources(asked: &Asked) -> Result<Vec<Source>, String> {
    let window = asked.window.as_deref().map(|text| pair("window", text)).transpose()?;
    if asked.synthetic.is_some() && !asked.trace.is_empty() {
        return Err("a file or generated requests: --trace and --synthetic do not go together".into());
    }
    let names = match &asked.synthetic {
        Some(name) => vec![if name.starts_with(GENERATED) { name.clone() } else { format!("{GENERATED}{name}") }],
        None => asked.trace.clone(),
    };
    if names.is_empty() {
        return Err("nothing to run: name a file with --trace, or --synthetic NAME --rate R".into());
    }
    names.iter().map(|name| source(name, asked, window)).collect()
}

fn source(name: &str, asked: &Asked, window: Option<(f64, f64)>) -> Result<Source, String> {
    if name.starts_with(GENERATED) && !Path::new(name).exists() {
        let rate = asked.rate.as_deref().ok_or_else(|| format!("{name} needs --rate, its requests a second"))?;
        let (rate, seconds) = (above_zero("rate", rate, 1e9)?, above_zero("seconds", &asked.seconds, 1e9)?);
        if asked.copies.is_some() {
            return Err("copies are of files: generated requests come at any rate".into());
        }
        if window.is_some() {
            return Err("window is for files: generated requests last as long as --seconds says".into());
        }
        let source = Source { name: name.to_owned(), kind: Kind::Generated(rate, seconds) };
        bounded(&source, 1.0)?;
        // of a wrong name, rate or length it is known before anything runs
        Trace::synthetic(name, rate, seconds, 1).map_err(line)?;
        return Ok(source);
    }
    let copies = asked.copies.as_deref().map(|text| whole("copies", text)).transpose()?;
    let mut trace = read(Path::new(name))?;
    if let Some((from, to)) = window {
        trace = trace.window(from, to).map_err(line)?;
    }
    Ok(Source { name: trace.name.clone(), kind: Kind::Recorded(trace, copies) })
}

/// A trace of a file; the size of its blocks may be in `NAME.meta.json` beside it.
pub fn read(file: &Path) -> Result<Trace, String> {
    let bytes = bytes(file, MOST_BYTES)?;
    let name = bare(file);
    let meta = file.with_file_name(format!("{name}.meta.json"));
    let block_size = match std::fs::read(&meta) {
        Ok(json) => router_sim::trace::block_size_in_meta(&meta.display().to_string(), &json).map_err(line)?,
        Err(_) => None,
    };
    let reading = Trace::read(&file.display().to_string(), &bytes, block_size).map_err(line)?;
    Ok(Trace { name, ..reading.trace })
}

/// A file's name without its folder and endings.
fn bare(file: &Path) -> String {
    let name = file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let ends = [".gz", ".jsonl", ".json", ".csv"];
    ends.iter().fold(name.as_str(), |name, end| name.strip_suffix(end).unwrap_or(name)).to_owned()
}

/// A built-in device, or one of a file.
pub fn device(text: &str) -> Result<Device, String> {
    let file = Path::new(text);
    if Device::names().any(|known| known == text) || !(file.exists() || text.contains(['/', '.'])) {
        return Device::named(text).map_err(line);
    }
    let bytes = bytes(file, 1 << 20)?;
    let written = String::from_utf8(bytes).map_err(|_| format!("cost model {text}: no text"))?;
    let name = file.file_stem().map_or_else(|| text.to_owned(), |stem| stem.to_string_lossy().into_owned());
    Device::parse(&name, &written).map_err(line)
}

/// Whether there is such a policy, where one of the schedulers asks the rivals for it.
pub fn check_policy(text: &str, schedulers: &[(String, Scheduler)]) -> Result<(), String> {
    if !schedulers.iter().any(|(_, scheduler)| matches!(scheduler, Scheduler::Continuous(_))) {
        return Ok(());
    }
    let device = Device::named("7b-h20").map_err(line)?;
    rival::make(text, &device, 1, 0).map(drop).map_err(line)
}

/// A file's bytes, which are no more than can be meant.
pub fn bytes(file: &Path, most: u64) -> Result<Vec<u8>, String> {
    let wrong = |error: std::io::Error| format!("cannot read {}: {error}", file.display());
    let mut bytes = Vec::new();
    std::fs::File::open(file).map_err(wrong)?.take(most + 1).read_to_end(&mut bytes).map_err(wrong)?;
    if bytes.len() as u64 > most {
        return Err(format!("cannot read {}: it has more than {most} bytes", file.display()));
    }
    Ok(bytes)
}

/// An error in one line.
pub fn line(error: impl std::fmt::Display) -> String {
    error.to_string().replace('\n', "; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_are_no_part_of_a_name() {
        for (file, name) in [("a/b.jsonl.gz", "b"), ("c.csv", "c"), ("d", "d"), ("e.v2.jsonl", "e.v2")] {
            assert_eq!(bare(Path::new(file)), name);
        }
    }
}
