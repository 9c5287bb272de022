//! Cost models and calibrations as JSON. What is read comes from elsewhere: every mistake is an error that names its field.

use serde::{Deserialize, Serialize};

use super::fit::{Fit, Sample};
use super::model::{CostModel, Iteration, Layout, PaddedCost, PagedPrefill, PagedStep};

/// A cost model and where it comes from: enough to judge it, and to fit it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Digest of the model, or its name.
    pub model: String,
    /// What it ran on, in words.
    pub device: String,
    /// Type of its weights, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// What ran it.
    pub engine: String,
    /// The fit.
    pub fit: Fit,
    /// What was measured.
    pub grid: Vec<Sample>,
}

/// JSON that is no calibration or cost model.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// It does not parse, a field is missing, or one has a wrong type or an impossible value.
    #[error("{path}: {reason}")]
    Field {
        /// The field, as `fit.model.step`; a dot for the whole text.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A measured time that is none.
    #[error("grid[{at}].seconds is {seconds}\nmeasured times are finite and more than zero")]
    Sample {
        /// Its place, from 0.
        at: usize,
        /// Its time.
        seconds: f64,
    },
}

impl Calibration {
    /// Reads and checks it.
    pub fn from_json(text: &str) -> Result<Self, JsonError> {
        let read: Self = parse(text)?;
        match read.grid.iter().position(|sample| !sample.is_time()) {
            Some(at) => Err(JsonError::Sample { at, seconds: read.grid[at].seconds }),
            None => Ok(read),
        }
    }

    /// As JSON, indented.
    pub fn to_json(&self) -> String {
        // strings, numbers and structs of these: nothing that serde_json cannot write
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

impl CostModel {
    /// Reads and checks a model alone, as it stands in a calibration.
    pub fn from_json(text: &str) -> Result<Self, JsonError> {
        parse(text)
    }

    /// As JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, JsonError> {
    let mut json = serde_json::Deserializer::from_str(text);
    let error = |path: String, reason: serde_json::Error| JsonError::Field { path, reason: reason.to_string() };
    let read = serde_path_to_error::deserialize(&mut json).map_err(|e| error(e.path().to_string(), e.into_inner()))?;
    json.end().map_err(|e| error(".".to_owned(), e))?;
    Ok(read)
}

/// A sample as it is written, flat: a count that is not given is 0.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSample {
    #[serde(default)]
    rows: u64,
    #[serde(default)]
    context: u64,
    #[serde(default)]
    longest: u64,
    #[serde(default)]
    prefill: u64,
    #[serde(default)]
    pairs: u64,
    seconds: f64,
}

impl From<RawSample> for Sample {
    fn from(raw: RawSample) -> Self {
        let RawSample { rows, context, longest, prefill, pairs, seconds } = raw;
        Self { iteration: Iteration { rows, context, longest, prefill, pairs }, seconds }
    }
}

impl From<Sample> for RawSample {
    fn from(sample: Sample) -> Self {
        let Iteration { rows, context, longest, prefill, pairs } = sample.iteration;
        Self { rows, context, longest, prefill, pairs, seconds: sample.seconds }
    }
}

/// A cost model as it is written, before it is known to be one.
#[derive(Deserialize)]
pub(super) struct RawModel {
    layout: Layout,
    prefill: RawPass,
    step: RawPass,
}

/// The coefficients of either layout, so that the one that is missing or too many can be named.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPass {
    constant: Option<f64>,
    per_row: Option<f64>,
    per_position: Option<f64>,
    per_cell: Option<f64>,
    per_token: Option<f64>,
    per_pair: Option<f64>,
    per_context: Option<f64>,
}

impl RawPass {
    /// These coefficients, and no others.
    fn take<const N: usize>(self, part: &str, layout: Layout, names: [&str; N]) -> Result<[f64; N], String> {
        let given = [
            ("constant", self.constant),
            ("per_row", self.per_row),
            ("per_position", self.per_position),
            ("per_cell", self.per_cell),
            ("per_token", self.per_token),
            ("per_pair", self.per_pair),
            ("per_context", self.per_context),
        ];
        if let Some((name, _)) = given.iter().find(|(name, value)| value.is_some() && !names.contains(name)) {
            let layout = if layout == Layout::Padded { "padded" } else { "paged" };
            return Err(format!("{part}.{name} is no coefficient of a {layout} worker"));
        }
        let mut values = [0.0; N];
        for (value, wanted) in values.iter_mut().zip(names) {
            let found = given.iter().find(|(name, _)| *name == wanted).and_then(|(_, value)| *value);
            *value = found.ok_or_else(|| format!("{part}.{wanted} is missing"))?;
        }
        Ok(values)
    }
}

impl TryFrom<RawModel> for CostModel {
    type Error = String;

    fn try_from(raw: RawModel) -> Result<Self, String> {
        let layout = raw.layout;
        let model = match layout {
            Layout::Padded => {
                let pass = |raw: RawPass, part| {
                    let names = ["constant", "per_row", "per_position", "per_cell"];
                    let [constant, per_row, per_position, per_cell] = raw.take(part, layout, names)?;
                    Ok::<_, String>(PaddedCost { constant, per_row, per_position, per_cell })
                };
                Self::Padded { prefill: pass(raw.prefill, "prefill")?, step: pass(raw.step, "step")? }
            }
            Layout::Paged => {
                let names = ["constant", "per_token", "per_pair"];
                let [constant, per_token, per_pair] = raw.prefill.take("prefill", layout, names)?;
                let prefill = PagedPrefill { constant, per_token, per_pair };
                let names = ["constant", "per_row", "per_context"];
                let [constant, per_row, per_context] = raw.step.take("step", layout, names)?;
                Self::Paged { prefill, step: PagedStep { constant, per_row, per_context } }
            }
        };
        model.check().map_err(|e| e.to_string())?;
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cost::model::tests::{coefficients, padded, paged};

    fn calibration(model: CostModel) -> Calibration {
        let iteration = Iteration { rows: 4, context: 100, ..Iteration::default() };
        Calibration {
            model: "sha256:00".to_owned(),
            device: "2 cores".to_owned(),
            dtype: Some("float32".to_owned()),
            engine: "torch 2".to_owned(),
            fit: Fit { model, r2: 0.99, mean_error: 0.02, p99_error: 0.1 },
            grid: vec![Sample { iteration, seconds: 0.01 }],
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(model in prop_oneof![padded(), paged()]) {
            let all = calibration(model);
            let read = Calibration::from_json(&all.to_json()).expect("what we wrote");
            // serde_json may miss the last bit of a number, unless it is told to take its time
            let near = |a: &f64, b: &f64| (a - b).abs() <= 1e-15 * a.abs();
            let [written, found] = [&model, &read.fit.model].map(coefficients);
            prop_assert!(written.iter().zip(&found).all(|(a, b)| near(a, b)), "{:?} {:?}", written, found);
            prop_assert_eq!(Calibration { fit: all.fit, ..read }, all);
            prop_assert_eq!(CostModel::from_json(&model.to_json()).expect("what we wrote"), read.fit.model);
        }

        #[test]
        fn no_text_panics(text in ".{0,60}", at in 0usize..600, junk in "[-0-9a-z\"{}\\[\\],:]{1,4}") {
            drop(Calibration::from_json(&text));
            let mut good = calibration(CostModel::unknown(Layout::Paged)).to_json();
            good.insert_str(at.min(good.len()), &junk);
            drop(Calibration::from_json(&good));
        }
    }

    #[test]
    fn mistakes_name_their_field() {
        let good = calibration(CostModel::unknown(Layout::Paged)).to_json();
        let cases = [
            ("\"per_row\": 0.00005", "\"per_row\": -0.00005", "fit.model: step.per_row is -0.00005"),
            ("\"per_row\": 0.00005", "\"per_row\": null", "fit.model: step.per_row is missing"),
            ("\"per_row\": 0.00005", "\"per_row\": NaN", "fit.model.step.per_row: expected"),
            ("\"per_row\": 0.00005", "\"per_row\": \"1\"", "fit.model.step.per_row: invalid type: string"),
            ("\"per_row\": 0.00005", "\"per_cell\": 1", "fit.model: step.per_cell is no coefficient of a paged worker"),
            ("\"per_row\": 0.00005", "\"per_rov\": 1", "fit.model.step.per_rov: unknown field"),
            ("\"per_row\": 0.00005,", "", "fit.model: step.per_row is missing"),
            ("\"per_row\": 0.00005", "\"per_row\": 1e999", "fit.model.step.per_row: number out of range"),
            ("\"per_row\": 0.00005", "\"per_row\": 1e9", "fit.model: step.per_row is 1000000000"),
            ("\"paged\"", "\"flat\"", "fit.model.layout: unknown variant `flat`"),
            ("\"rows\": 4", "\"rows\": -4", "grid[0].rows: invalid value"),
            ("\"seconds\": 0.01", "\"seconds\": 0", "grid[0].seconds is 0"),
            ("\"seconds\": 0.01", "\"seconds\": -1.5", "grid[0].seconds is -1.5"),
            ("\"device\": \"2 cores\",", "", ".: missing field `device`"),
        ];
        for (old, new, says) in cases {
            assert!(good.contains(old), "{old} in {good}");
            let error = Calibration::from_json(&good.replace(old, new)).expect_err(new).to_string();
            assert!(error.starts_with(says), "{new}: {error}");
        }
        let error = CostModel::from_json("{\"layout\": \"paged\", \"prefill\": {}, \"step\": {}} x").expect_err("junk");
        assert!(error.to_string().contains("prefill.constant is missing"), "{error}");
    }
}
