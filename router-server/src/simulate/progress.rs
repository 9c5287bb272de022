//! How far the runs are, on stderr, if a person sees it.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::execute::Watch;
use super::plan::Plan;

/// A bar is as long as all runs together, each so many steps.
const STEPS: u64 = 1_000;

/// A bar, and the flag that a signal sets.
pub struct Progress<'a> {
    bar: ProgressBar,
    stop: &'a AtomicBool,
    /// Steps of each run so far.
    done: Mutex<Vec<u64>>,
}

impl<'a> Progress<'a> {
    /// Hidden where stderr is no terminal.
    pub fn new(plan: &Plan, stop: &'a AtomicBool) -> Self {
        let runs = plan.cases.len();
        let bar = ProgressBar::with_draw_target(Some(runs as u64 * STEPS), ProgressDrawTarget::stderr_with_hz(5));
        let style = ProgressStyle::with_template("{wide_bar} {percent:>3} % of {msg}  {elapsed}, {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(if runs == 1 { "a run".to_owned() } else { format!("{runs} runs") });
        Self { bar, stop, done: Mutex::new(vec![0; runs]) }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn reached(&self, at: usize, steps: u64) {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut done[at], steps);
        self.bar.inc(steps.saturating_sub(before));
    }
}

impl Watch for Progress<'_> {
    fn share(&self, at: usize, share: f64) -> bool {
        self.reached(at, (share.clamp(0.0, 1.0) * STEPS as f64) as u64);
        !self.stop.load(Ordering::Relaxed)
    }

    fn over(&self, at: usize) {
        self.reached(at, STEPS);
    }
}
