//! One line per thing that takes time: what, how far, how long. On a terminal it is one line that changes.

use std::{
    io::IsTerminal as _,
    sync::Mutex,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// A numbered sequence of steps, on standard error; several threads may take steps at once.
#[derive(Debug)]
pub struct Progress {
    title: String,
    began: Instant,
    count: Mutex<Count>,
    bar: Option<ProgressBar>,
}

#[derive(Debug)]
struct Count {
    total: usize,
    current: usize,
}

impl Progress {
    /// A sequence called `title` that will have `total` steps.
    #[must_use]
    pub fn new(title: impl Into<String>, total: usize) -> Self {
        let title = title.into();
        let bar = std::io::stderr().is_terminal().then(|| bar(&title, total)).flatten();
        Self { title, began: Instant::now(), count: Mutex::new(Count { total, current: 0 }), bar }
    }

    /// Says that the next step begins.
    pub fn step(&self, what: &str) {
        let Ok(mut count) = self.count.lock() else { return };
        count.current += 1;
        // A sequence that turns out longer than announced says so instead of counting past its end.
        count.total = count.total.max(count.current);
        if let Some(bar) = &self.bar {
            bar.set_length(count.total as u64);
            bar.set_position(count.current as u64);
            bar.set_message(what.to_owned());
        } else {
            let elapsed = minutes(self.began.elapsed());
            eprintln!("{}: [{}/{}, {elapsed}] {what}", self.title, count.current, count.total);
        }
    }

    /// Says something that stays, between the steps.
    pub fn note(&self, what: &str) {
        let line = format!("{}: {what}", self.title);
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// Says how long the whole sequence took.
    pub fn done(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: {what} ({})", self.title, minutes(self.began.elapsed()));
    }
}

fn bar(title: &str, total: usize) -> Option<ProgressBar> {
    let style = ProgressStyle::with_template("{prefix}: [{pos}/{len}, {elapsed}] {wide_msg}").ok()?;
    let bar = ProgressBar::new(total as u64).with_style(style).with_prefix(title.to_owned());
    bar.enable_steady_tick(Duration::from_secs(1));
    Some(bar)
}

/// `12.3 s`, or `2 min 05 s` from a minute on.
#[must_use]
pub fn minutes(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_say_them() {
        assert_eq!(minutes(Duration::from_millis(12_340)), "12.3 s");
        assert_eq!(minutes(Duration::from_secs(125)), "2 min 05 s");
    }
}
