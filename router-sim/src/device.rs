//! A kind of worker: how long its iterations take, and what fits into it. Written in a file of `models/`, each coefficient
//! with where it comes from: derived from published figures of the device, or measured.

use router_core::{Calibration, CostModel, Layout, Micros, Tokens};
use serde::Deserialize;

use crate::named::hint;
use crate::timing::{Host, Law, Norm, Pace};

/// A model on a device.
#[derive(Clone, Debug)]
pub struct Device {
    /// Such as `7b-h20`.
    pub name: String,
    /// Seconds of an iteration, without host time.
    pub law: Law,
    /// Tokens of KV that fit.
    pub kv: Tokens,
    /// Most tokens of an iteration, prefill chunks and decoding rows together.
    pub chunk: u32,
    /// Most rows of a batch.
    pub max_rows: u32,
    /// Host time of an iteration of an iteration-level engine that the device waits for. `h` of the study.
    pub host: Micros,
    /// What a slice start exposes. `o` of the study.
    pub start: Micros,
}

/// No device, or none that can be.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DeviceError {
    /// A name nobody has.
    #[error("no such cost model: {name}\n{hint}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// The nearest, or all.
        hint: String,
    },
    /// A file that does not read as one.
    #[error("cost model {name}: {reason}")]
    Text {
        /// The file.
        name: String,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// A number that no device has.
    #[error("cost model {name}: {field} is {value}\n{expected}")]
    Value {
        /// The file.
        name: String,
        /// The field.
        field: &'static str,
        /// What it says.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
}

/// A file of `models/`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Tokens.
    kv: u64,
    chunk: u32,
    max_rows: u32,
    /// Seconds.
    host: f64,
    start: f64,
    norm: Option<Norm>,
    linear: Option<CostModel>,
}

const FILES: [(&str, &str); 13] = [
    ("7b-a100", include_str!("../models/7b-a100.toml")),
    ("7b-h20", include_str!("../models/7b-h20.toml")),
    ("7b-h200", include_str!("../models/7b-h200.toml")),
    ("8b-a100", include_str!("../models/8b-a100.toml")),
    ("8b-h200", include_str!("../models/8b-h200.toml")),
    ("13b-a100", include_str!("../models/13b-a100.toml")),
    ("13b-h20", include_str!("../models/13b-h20.toml")),
    ("13b-h200", include_str!("../models/13b-h200.toml")),
    ("30b-a3b-a100", include_str!("../models/30b-a3b-a100.toml")),
    ("30b-a3b-h20", include_str!("../models/30b-a3b-h20.toml")),
    ("30b-a3b-h200", include_str!("../models/30b-a3b-h200.toml")),
    ("cpu-110m", include_str!("../models/cpu-110m.toml")),
    ("cpu-airline-tiny", include_str!("../models/cpu-airline-tiny.toml")),
];

/// No time of an iteration is as long, in seconds.
const DAY: f64 = 86_400.0;

impl Device {
    /// Names of the files that come with it.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FILES.iter().map(|(name, _)| *name)
    }

    /// One of these.
    pub fn named(name: &str) -> Result<Self, DeviceError> {
        let known: Vec<&str> = Self::names().collect();
        let text = FILES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text);
        let unknown = || DeviceError::Unknown { name: name.to_owned(), hint: hint(name, &known) };
        Self::parse(name, text.ok_or_else(unknown)?)
    }

    /// The text of a file like those of `models/`, or the JSON that `scls-router calibrate` writes (a calibration, or a cost
    /// model alone). JSON says nothing of memory: the worker's own defaults are taken then (64 rows, chunks of 512, KV of
    /// four contexts of 8192), and no host time, as what was measured has it.
    pub fn parse(name: &str, text: &str) -> Result<Self, DeviceError> {
        let wrong = |reason: String| DeviceError::Text { name: name.to_owned(), reason };
        if text.trim_start().starts_with('{') {
            // a calibration has its model in `fit`
            let model = if text.contains("\"fit\"") {
                Calibration::from_json(text).map(|all| all.fit.model)
            } else {
                CostModel::from_json(text)
            };
            let law = Law::Linear(model.map_err(|e| wrong(e.to_string()))?);
            let (host, start) = (Micros::ZERO, Micros::ZERO);
            return Ok(Self {
                name: name.to_owned(),
                law,
                kv: Tokens(4 * 8192),
                chunk: 512,
                max_rows: 64,
                host,
                start,
            });
        }
        let file: File = toml::from_str(text).map_err(|e| wrong(e.to_string().trim_end().to_owned()))?;
        let value = |field, value, expected| DeviceError::Value { name: name.to_owned(), field, value, expected };
        let law = match (file.norm, file.linear) {
            (Some(norm), None) => Law::Norm(norm),
            (None, Some(model)) => Law::Linear(model),
            _ => return Err(wrong("a law is missing, or two are there\nwrite one of [norm] and [linear]".to_owned())),
        };
        let times = file.norm.iter().flat_map(Norm::coefficients).chain([("host", file.host), ("start", file.start)]);
        for (field, seconds) in times {
            if !(0.0..DAY).contains(&seconds) {
                return Err(value(field, seconds, "times are seconds, finite and not negative, each less than a day"));
            }
        }
        if file.norm.is_some_and(|norm| norm.weights + norm.token <= 0.0) {
            return Err(value("weights", 0.0, "an iteration must take time: weights or token, in seconds"));
        }
        let counts = [("kv", file.kv), ("chunk", file.chunk.into()), ("max_rows", file.max_rows.into())];
        for (field, count) in counts {
            if count == 0 || count > 1 << 40 {
                return Err(value(field, count as f64, "counts are from 1 to 2^40"));
            }
        }
        let micros = |seconds: f64| Micros((seconds * 1e6).round() as u64);
        Ok(Self {
            name: name.to_owned(),
            law,
            kv: Tokens(file.kv),
            chunk: file.chunk,
            max_rows: file.max_rows,
            host: micros(file.host),
            start: micros(file.start),
        })
    }

    /// How a worker of it keeps time where its host is exposed like that; `start` is to be set to zero for a worker without slices.
    pub fn pace(&self, host: Host) -> Pace {
        Pace { law: self.law, chunk: self.chunk, start: self.start, host, noise: crate::timing::Noise::default() }
    }

    /// What a worker of it announces to the router.
    pub fn cost_model(&self, layout: Layout, host: Host) -> CostModel {
        self.law.linear(layout, host)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_file_reads_and_is_near_the_study() {
        for name in Device::names() {
            let device = Device::named(name).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(device.name, name);
            assert!(device.start <= device.host, "{name}: a slice start costs no more than an iteration's host time");
        }
        // weights ms, token ms, kv us, thousand tokens of KV: the tables of the simulation study
        let study = [
            ("13b-a100", [17.0, 0.152, 0.54, 52.0]),
            ("7b-h20", [5.1, 0.147, 0.024, 1150.0]),
            ("8b-h200", [4.4, 0.029, 0.042, 800.0]),
        ];
        for (name, wanted) in study {
            let device = Device::named(name).expect("it is there");
            let Law::Norm(norm) = device.law else { panic!("{name} is derived") };
            let found = [norm.weights * 1e3, norm.token * 1e3, norm.kv * 1e6, device.kv.0 as f64 * 1e-3];
            assert!(found.iter().zip(wanted).all(|(a, b)| (a / b - 1.0).abs() < 1e-9), "{name}: {found:?}");
        }
        let Law::Norm(norm) = Device::named("13b-a100").expect("it is there").law else { panic!("derived") };
        assert_eq!(norm, Norm::llama_13b_a100());
        assert_eq!(Device::named("13b-a100").expect("it is there").kv.0, Norm::LLAMA_13B_A100_KV);
        // routing: KV that fits, in thousands
        for (name, wanted) in [("7b-h20", 1190.0), ("30b-a3b-h20", 229.0), ("30b-a3b-h200", 666.0), ("8b-a100", 405.0)]
        {
            let kv = Device::named(name).expect("it is there").kv.0 as f64 * 1e-3;
            assert!((kv / wanted - 1.0).abs() < 0.05, "{name}: {kv}");
        }
    }

    #[test]
    fn mistakes_say_what_to_do() {
        let good = include_str!("../models/13b-a100.toml");
        let cases = [
            ("weights = 17.0e-3", "weights = -1", "weights is -1\ntimes are seconds"),
            ("weights = 17.0e-3", "weights = nan", "weights is NaN"),
            ("weights = 17.0e-3", "weight = 1", "unknown field `weight`"),
            ("weights = 17.0e-3", "", "missing field `weights`"),
            ("kv = 52_000", "kv = 0", "kv is 0\ncounts are from 1"),
            ("kv = 52_000", "kv = -5", "kv"),
            ("[norm]", "[norn]", "unknown field `norn`"),
            ("host = 3.0e-3", "host = 1e9", "host is 1000000000"),
        ];
        for (old, new, says) in cases {
            assert!(good.contains(old), "{old}");
            let error = Device::parse("mine", &good.replacen(old, new, 1)).expect_err(new).to_string();
            assert!(error.starts_with("cost model mine: ") && error.contains(says), "{new}: {error}");
        }
        let no_law = &good[..good.find("[norm]").expect("it is there")];
        assert!(Device::parse("mine", no_law).expect_err("no law").to_string().contains("write one of [norm]"));
        let error = Device::named("13b-a10").expect_err("no such").to_string();
        assert_eq!(error, "no such cost model: 13b-a10\ndid you mean 13b-a100?");
    }

    #[test]
    fn json_of_a_calibration_is_a_linear_law() {
        let model = CostModel::unknown(Layout::Paged);
        let device = Device::parse("cal", &model.to_json()).expect("a model");
        assert_eq!(device.cost_model(Layout::Paged, Host::default()), model);
        let error = Device::parse("cal", "{\"fit\": {}}").expect_err("no calibration").to_string();
        assert!(error.starts_with("cost model cal: "), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,80}", at in 0usize..3000, junk in "[-0-9a-z=\"{}\\[\\].\n]{1,4}") {
            drop(Device::parse("any", &text));
            drop(Device::parse("any", &format!("{{{text}")));
            drop(Device::named(&text));
            let mut good = include_str!("../models/13b-a100.toml").to_owned();
            let at = (0..=at.min(good.len())).rev().find(|at| good.is_char_boundary(*at)).unwrap_or(0);
            good.insert_str(at, &junk);
            drop(Device::parse("any", &good));
        }
    }
}
