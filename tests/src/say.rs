//! One line per thing that takes time: what, how far, how long.

use std::time::Instant;

/// A numbered sequence of steps, printed to standard error as they begin and end.
#[derive(Debug)]
pub struct Progress {
    title: String,
    total: usize,
    current: usize,
    began: Instant,
}

impl Progress {
    /// A sequence called `title` that will have `total` steps.
    #[must_use]
    pub fn new(title: impl Into<String>, total: usize) -> Self {
        Self { title: title.into(), total, current: 0, began: Instant::now() }
    }

    /// Says that the next step begins.
    pub fn step(&mut self, what: &str) {
        self.current += 1;
        // A sequence that turns out longer than announced says so instead of counting past its end.
        self.total = self.total.max(self.current);
        eprintln!("{}: [{}/{}] {what}", self.title, self.current, self.total);
    }

    /// Says how long the whole sequence took.
    pub fn done(&self, what: &str) {
        eprintln!("{}: {what} ({:.1} s)", self.title, self.began.elapsed().as_secs_f64());
    }
}
