//! Cost models: what an iteration takes, from coefficients, from measurements, or from JSON.

use pyo3::exceptions::{PyKeyError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyTuple, PyType};
use router_core::{BatchLoad, Fit, Iteration, Layout, PaddedCost, PagedPrefill, PagedStep, Sample, Tokens};

use crate::error::{cost_error, fit_error};

/// How long an iteration takes on a worker, as a function of what is in it: linear, no coefficient below zero, so that
/// more work never takes less time. Immutable, comparable, picklable. All times are seconds.
///
/// Two layouts. A *paged* worker computes what is there: rows that decode, the tokens they see, prefill tokens, and the
/// pairs of these with the tokens they attend.
///
/// >>> paged = CostModel.paged(
/// ...     prefill_constant=0.0, prefill_per_token=1e-4, prefill_per_pair=0.0,
/// ...     step_constant=1e-2, step_per_row=1e-4, step_per_context=1e-6,
/// ... )
/// >>> round(paged.iteration(rows=10, context=5000), 6)  # ten rows decode
/// 0.016
/// >>> round(paged.iteration(rows=10, context=5000, prefill=200), 6)  # and a prompt's tokens ride along
/// 0.036
///
/// A *padded* worker computes a rectangle of ``rows`` rows, each as long as the longest (arXiv 2406.13511).
///
/// >>> padded = CostModel.padded(prefill=(1e-2, 0.0, 0.0, 1e-4), step=(1e-2, 1e-4, 0.0, 1e-6))
/// >>> round(padded.slice(rows=4, longest=100, steps=1), 6)  # the prompt's pass, which draws the first tokens
/// 0.05
///
/// Args:
///     form: what ``to_dict`` gives.
///
/// Raises:
///     CostError: a coefficient is missing, negative or not finite; the message names it.
///     ValueError: there is no such shape.
///     TypeError: a coefficient is no number.
#[pyclass(frozen, eq, module = "scls_router")]
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CostModel {
    core: router_core::CostModel,
    quality: Option<Quality>,
}

/// How well a fit meets its samples.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Quality {
    r2: f64,
    mean_error: f64,
    p99_error: f64,
}

const PADDED: [&str; 4] = ["constant", "per_row", "per_position", "per_cell"];
const PAGED_PREFILL: [&str; 3] = ["constant", "per_token", "per_pair"];
const PAGED_STEP: [&str; 3] = ["constant", "per_row", "per_context"];

#[pymethods]
impl CostModel {
    #[new]
    fn new(form: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = form.py();
        let shape = item(form, "shape")?.map_or_else(|| item(form, "layout"), |shape| Ok(Some(shape)))?;
        let shape: String = shape.ok_or_else(|| missing(py, "shape"))?.extract()?;
        let core = match read_layout(&shape)? {
            Layout::Padded => {
                let [prefill, step] = ["prefill", "step"].map(|part| coefficients(form, part, PADDED));
                router_core::CostModel::Padded { prefill: padded_cost(prefill?), step: padded_cost(step?) }
            }
            Layout::Paged => {
                let [constant, per_token, per_pair] = coefficients(form, "prefill", PAGED_PREFILL)?;
                let prefill = PagedPrefill { constant, per_token, per_pair };
                let [constant, per_row, per_context] = coefficients(form, "step", PAGED_STEP)?;
                router_core::CostModel::Paged { prefill, step: PagedStep { constant, per_row, per_context } }
            }
        };
        Self::checked(py, core, quality(form)?)
    }

    /// The model of a paged worker, each coefficient in seconds.
    ///
    /// Args:
    ///     prefill_constant: any prefill in an iteration.
    ///     prefill_per_token: each prefilled token.
    ///     prefill_per_pair: each pair of a prefilled token and one it attends.
    ///     step_constant: an iteration.
    ///     step_per_row: each row that decodes.
    ///     step_per_context: each token that a decoding row sees.
    ///
    /// Raises:
    ///     CostError: a coefficient is negative or not finite; the message names it.
    #[staticmethod]
    #[pyo3(signature = (*, prefill_constant, prefill_per_token, prefill_per_pair, step_constant, step_per_row,
        step_per_context))]
    fn paged(
        py: Python<'_>,
        prefill_constant: f64,
        prefill_per_token: f64,
        prefill_per_pair: f64,
        step_constant: f64,
        step_per_row: f64,
        step_per_context: f64,
    ) -> PyResult<Self> {
        let (constant, per_token, per_pair) = (prefill_constant, prefill_per_token, prefill_per_pair);
        let prefill = PagedPrefill { constant, per_token, per_pair };
        let (constant, per_row, per_context) = (step_constant, step_per_row, step_per_context);
        let step = PagedStep { constant, per_row, per_context };
        Self::checked(py, router_core::CostModel::Paged { prefill, step }, None)
    }

    /// The model of a padded worker: ``constant + per_row*N + per_position*L + per_cell*N*L`` seconds for a pass over
    /// ``N`` rows padded to length ``L``.
    ///
    /// Args:
    ///     prefill: ``(constant, per_row, per_position, per_cell)`` of the pass over the prompts.
    ///     step: the same of a decode step.
    ///
    /// Raises:
    ///     CostError: a coefficient is negative or not finite; the message names it.
    ///     ValueError: these are not four.
    #[staticmethod]
    #[pyo3(signature = (*, prefill, step))]
    fn padded(py: Python<'_>, prefill: [f64; 4], step: [f64; 4]) -> PyResult<Self> {
        let [prefill, step] = [prefill, step].map(padded_cost);
        Self::checked(py, router_core::CostModel::Padded { prefill, step }, None)
    }

    /// The model that meets measured iterations best: least squares of relative errors, no coefficient below zero.
    ///
    /// >>> truth = CostModel.padded(prefill=(0.01, 0.0, 0.0, 1e-4), step=(0.01, 1e-4, 0.0, 1e-6))
    /// >>> shapes = [(rows, longest) for rows in (1, 4, 16) for longest in (64, 256, 1024)]
    /// >>> grid = [dict(rows=n, longest=l, prefill=n * l * fills) for n, l in shapes for fills in (0, 1)]
    /// >>> model = CostModel.fit([dict(it, seconds=truth.iteration(**it)) for it in grid], layout="padded")
    /// >>> model.p99_error < 1e-6, round(model.to_dict()["step"]["per_cell"], 9)
    /// (True, 1e-06)
    ///
    /// Args:
    ///     samples: dicts with the arguments of ``iteration``, 0 where missing, and the ``seconds`` it took.
    ///     layout: ``paged`` or ``padded``.
    ///
    /// Raises:
    ///     FitError: too few samples, or a time that is none.
    ///     ValueError: a sample has no ``seconds``, or a key that is none; or there is no such layout.
    ///     OverflowError: a count is negative.
    #[staticmethod]
    #[pyo3(signature = (samples, layout = "paged"))]
    fn fit(py: Python<'_>, samples: Vec<Bound<'_, PyMapping>>, layout: &str) -> PyResult<Self> {
        let layout = read_layout(layout)?;
        let samples = samples.iter().enumerate().map(|(at, given)| sample(at, given)).collect::<PyResult<Vec<_>>>()?;
        let fit = py.detach(|| Fit::new(layout, &samples)).map_err(|error| fit_error(py, &error))?;
        let Fit { model, r2, mean_error, p99_error } = fit;
        Self::checked(py, model, Some(Quality { r2, mean_error, p99_error }))
    }

    /// A model from JSON: that of ``to_json``, or the whole file of a calibration.
    ///
    /// Raises:
    ///     CostError: a coefficient is missing, negative or not finite; the message names it.
    ///     ValueError: this is no JSON, or there is no such layout.
    #[staticmethod]
    fn from_json(text: &Bound<'_, PyAny>) -> PyResult<Self> {
        // Python's own reader: it gives every number back to the last bit
        let mut form = text.py().import("json")?.call_method1("loads", (text,))?;
        if !form.is_instance_of::<PyDict>() {
            return Err(PyValueError::new_err(format!("a cost model is a JSON object: got {form}")));
        }
        if let Some(fit) = item(&form, "fit")? {
            form = fit;
        }
        match item(&form, "model")? {
            None => Self::new(&form),
            Some(model) => Ok(Self { quality: quality(&form)?, ..Self::new(&model)? }),
        }
    }

    /// As JSON, with ``layout`` for ``shape``: as the router and calibrations have it.
    fn to_json(&self, py: Python<'_>) -> PyResult<String> {
        let model = PyDict::new(py);
        model.set_item("layout", self.layout())?;
        let (prefill, step) = self.parts(py)?;
        model.set_item("prefill", prefill)?;
        model.set_item("step", step)?;
        let mut form = model;
        if let Some(quality) = self.quality {
            let fit = PyDict::new(py);
            fit.set_item("model", form)?;
            quality.write(&fit)?;
            form = fit;
        }
        py.import("json")?.call_method1("dumps", (form,))?.extract()
    }

    /// ``shape``, the coefficients of ``prefill`` and ``step``, and of a fit ``r2``, ``mean_error`` and ``p99_error``.
    ///
    /// >>> model = CostModel.padded(prefill=(0.01, 0.0, 0.0, 1e-4), step=(0.01, 1e-4, 0.0, 1e-6))
    /// >>> model.to_dict()["step"]
    /// {'constant': 0.01, 'per_row': 0.0001, 'per_position': 0.0, 'per_cell': 1e-06}
    /// >>> CostModel(model.to_dict()) == CostModel.from_json(model.to_json()) == model
    /// True
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let form = PyDict::new(py);
        form.set_item("shape", self.layout())?;
        let (prefill, step) = self.parts(py)?;
        form.set_item("prefill", prefill)?;
        form.set_item("step", step)?;
        if let Some(quality) = self.quality {
            quality.write(&form)?;
        }
        Ok(form)
    }

    /// ``paged`` or ``padded``.
    #[getter]
    fn layout(&self) -> &'static str {
        match self.core.layout() {
            Layout::Padded => "padded",
            Layout::Paged => "paged",
        }
    }

    /// Seconds of one iteration.
    ///
    /// Args:
    ///     rows: rows that decode; padded: all rows, in the pass over the prompts too.
    ///     context: tokens that the decoding rows see, summed.
    ///     longest: length of the longest row, which padded workers pay for.
    ///     prefill: prefill tokens; padded: anything but 0 makes this the pass over the prompts.
    ///     pairs: pairs of a prefilled token and one it attends.
    ///
    /// Raises:
    ///     OverflowError: a number is negative.
    #[pyo3(signature = (rows = 0, context = 0, longest = 0, prefill = 0, pairs = 0))]
    fn iteration(&self, rows: u64, context: u64, longest: u64, prefill: u64, pairs: u64) -> f64 {
        self.core.iteration(&Iteration { rows, context, longest, prefill, pairs })
    }

    /// Seconds of a batch over ``steps`` iterations if no row ends; the first draws each row's first token. O(1).
    ///
    /// Args:
    ///     rows: rows of the batch.
    ///     longest: tokens of the longest; only padded workers pay for it.
    ///     context: tokens of all rows; only paged workers pay for it.
    ///     uncached: of these, tokens that want prefill.
    ///     steps: iterations.
    ///
    /// Raises:
    ///     OverflowError: a number is negative.
    #[pyo3(signature = (rows, longest = 0, context = 0, uncached = 0, steps = 1))]
    fn slice(&self, rows: u64, longest: u64, context: u64, uncached: u64, steps: u64) -> f64 {
        let (longest, context, uncached) = (Tokens(longest), Tokens(context), Tokens(uncached));
        self.core.slice(&BatchLoad { rows, longest, context, uncached }, steps)
    }

    /// Coefficient of determination of the fit; None of a model that was not fitted.
    #[getter]
    fn r2(&self) -> Option<f64> {
        self.quality.map(|quality| quality.r2)
    }

    /// Mean relative error of the fit over its samples.
    #[getter]
    fn mean_error(&self) -> Option<f64> {
        self.quality.map(|quality| quality.mean_error)
    }

    /// The relative error that 99 % of the fit's samples stay below.
    #[getter]
    fn p99_error(&self) -> Option<f64> {
        self.quality.map(|quality| quality.p99_error)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyType>, Bound<'py, PyTuple>)> {
        Ok((py.get_type::<Self>(), PyTuple::new(py, [self.to_dict(py)?])?))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("CostModel({})", self.to_dict(py)?))
    }
}

impl CostModel {
    pub(crate) fn core(&self) -> &router_core::CostModel {
        &self.core
    }

    fn parts<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyDict>, Bound<'py, PyDict>)> {
        let part = |names: &[&str], values: &[f64]| -> PyResult<Bound<'py, PyDict>> {
            let part = PyDict::new(py);
            names.iter().zip(values).try_for_each(|(name, value)| part.set_item(name, value))?;
            Ok(part)
        };
        Ok(match self.core {
            router_core::CostModel::Padded { prefill, step } => {
                (part(&PADDED, &four(prefill))?, part(&PADDED, &four(step))?)
            }
            router_core::CostModel::Paged { prefill: p, step: s } => (
                part(&PAGED_PREFILL, &[p.constant, p.per_token, p.per_pair])?,
                part(&PAGED_STEP, &[s.constant, s.per_row, s.per_context])?,
            ),
        })
    }

    fn checked(py: Python<'_>, core: router_core::CostModel, quality: Option<Quality>) -> PyResult<Self> {
        core.check().map_err(|error| cost_error(py, &error.to_string()))?;
        Ok(Self { core, quality })
    }
}

impl Quality {
    fn write(self, form: &Bound<'_, PyDict>) -> PyResult<()> {
        form.set_item("r2", self.r2)?;
        form.set_item("mean_error", self.mean_error)?;
        form.set_item("p99_error", self.p99_error)
    }
}

/// Of a fit, if this is one.
fn quality(form: &Bound<'_, PyAny>) -> PyResult<Option<Quality>> {
    if item(form, "r2")?.is_none() {
        return Ok(None);
    }
    let of = |name| number(form, name, name);
    Ok(Some(Quality { r2: of("r2")?, mean_error: of("mean_error")?, p99_error: of("p99_error")? }))
}

fn sample(at: usize, given: &Bound<'_, PyMapping>) -> PyResult<Sample> {
    let mut iteration = Iteration::default();
    let mut seconds = None;
    for item in given.items()? {
        let (key, value): (String, Bound<'_, PyAny>) = item.extract()?;
        match key.as_str() {
            "rows" => iteration.rows = value.extract()?,
            "context" => iteration.context = value.extract()?,
            "longest" => iteration.longest = value.extract()?,
            "prefill" => iteration.prefill = value.extract()?,
            "pairs" => iteration.pairs = value.extract()?,
            "seconds" => seconds = Some(value.extract()?),
            _ => {
                let keys = "rows, context, longest, prefill, pairs and seconds";
                return Err(PyValueError::new_err(format!("sample {at} has a key {key}\na sample has {keys}")));
            }
        }
    }
    let seconds = seconds.ok_or_else(|| PyValueError::new_err(format!("sample {at} has no seconds")))?;
    Ok(Sample { iteration, seconds })
}

pub(crate) fn read_layout(name: &str) -> PyResult<Layout> {
    match name {
        "padded" => Ok(Layout::Padded),
        "paged" => Ok(Layout::Paged),
        _ => Err(PyValueError::new_err(format!("no such layout: {name}\nlayouts: paged, padded"))),
    }
}

fn padded_cost([constant, per_row, per_position, per_cell]: [f64; 4]) -> PaddedCost {
    PaddedCost { constant, per_row, per_position, per_cell }
}

fn four(cost: PaddedCost) -> [f64; 4] {
    [cost.constant, cost.per_row, cost.per_position, cost.per_cell]
}

fn coefficients<const N: usize>(form: &Bound<'_, PyAny>, part: &str, names: [&str; N]) -> PyResult<[f64; N]> {
    let given = item(form, part)?.ok_or_else(|| missing(form.py(), part))?;
    let mut values = [0.0; N];
    for (value, name) in values.iter_mut().zip(names) {
        *value = number(&given, name, &format!("{part}.{name}"))?;
    }
    Ok(values)
}

fn number(given: &Bound<'_, PyAny>, key: &str, name: &str) -> PyResult<f64> {
    let value = item(given, key)?.ok_or_else(|| missing(given.py(), name))?;
    value.extract().map_err(|_| PyTypeError::new_err(format!("{name} is a number: got {value}")))
}

fn item<'py>(given: &Bound<'py, PyAny>, key: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
    match given.get_item(key) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_instance_of::<PyKeyError>(given.py()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn missing(py: Python<'_>, name: &str) -> PyErr {
    cost_error(py, &format!("{name} is missing"))
}
