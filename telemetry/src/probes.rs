//! Whether a program lives and is ready. Living means that its work goes on, not that a port answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Set by the program's work, read by the probes. Copies share one state.
#[derive(Clone, Debug)]
pub struct Probes {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    // Milliseconds after `started`.
    beat: AtomicU64,
    limit: Duration,
    ready: AtomicBool,
}

impl Probes {
    /// Alive until `limit` passes without a beat; not ready yet.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        let shared =
            Shared { started: Instant::now(), beat: AtomicU64::new(0), limit, ready: AtomicBool::new(false) };
        Self { shared: Arc::new(shared) }
    }

    /// The work goes on.
    pub fn beat(&self) {
        let now = u64::try_from(self.shared.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.shared.beat.fetch_max(now, Ordering::Relaxed);
    }

    /// Whether what the work needs is there.
    pub fn set_ready(&self, ready: bool) {
        self.shared.ready.store(ready, Ordering::Relaxed);
    }

    /// Time since the last beat.
    #[must_use]
    pub fn silence(&self) -> Duration {
        let beat = Duration::from_millis(self.shared.beat.load(Ordering::Relaxed));
        self.shared.started.elapsed().saturating_sub(beat)
    }

    /// Whether the last beat isn't too long ago.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.silence() < self.shared.limit
    }

    /// Alive, and with all that the work needs.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.is_alive() && self.shared.ready.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_hangs_is_neither_alive_nor_ready() {
        let hung = Probes::new(Duration::ZERO);
        hung.set_ready(true);
        assert!(!hung.is_alive() && !hung.is_ready());
    }

    #[test]
    fn work_that_lacks_something_is_alive_and_not_ready() {
        let probes = Probes::new(Duration::from_mins(1));
        probes.beat();
        assert!(probes.is_alive() && !probes.is_ready());
        probes.clone().set_ready(true);
        assert!(probes.is_ready());
    }
}
