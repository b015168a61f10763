//! The steps with their results and durations.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::progress;

/// The steps so far.
#[derive(Default)]
pub(super) struct Report {
    steps: Vec<Step>,
}

struct Step {
    name: &'static str,
    took: Duration,
    outcome: Result<String, String>,
}

impl Report {
    /// Runs a step, which returns its findings.
    pub(super) fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<String>) -> Result<()> {
        self.value(name, || Ok(((), work()?)))
    }

    /// Runs a step that creates a value.
    pub(super) fn value<T>(
        &mut self,
        name: &'static str,
        work: impl FnOnce() -> Result<(T, String)>,
    ) -> Result<T> {
        let started = Instant::now();
        let result = work();
        let outcome = match &result {
            Ok((_, found)) => Ok(found.clone()),
            Err(error) => Err(format!("{error:#}")),
        };
        let step = Step { name, took: started.elapsed(), outcome };
        progress::say(&step.to_string());
        self.steps.push(step);
        result.map(|(value, _)| value)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, found) = match &self.outcome {
            Ok(found) => ("ok    ", found),
            Err(error) => ("FAILED", error),
        };
        write!(f, "{sign} {:<34} {:>6.1} s  {found}", self.name, self.took.as_secs_f32())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.steps.iter().try_for_each(|step| writeln!(f, "{step}"))?;
        let failed = self.steps.iter().filter(|step| step.outcome.is_err()).count();
        writeln!(f, "{} steps passed, {failed} failed", self.steps.len() - failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_counted_and_shown() {
        let mut report = Report::default();
        assert_eq!(report.value("one", || Ok((1, "found".into()))).unwrap(), 1);
        assert!(report.step("two", || anyhow::bail!("broken")).is_err());
        let text = report.to_string();
        assert!(text.starts_with("ok     one") && text.contains("FAILED two"), "{text}");
        assert!(text.ends_with("1 steps passed, 1 failed\n"), "{text}");
    }
}
