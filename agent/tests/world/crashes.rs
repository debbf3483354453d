//! Crashes at every operation, and what is gone on with or undone after them.

use flannel_migration_agent::journal::{Journal, Progress};
use flannel_migration_agent::steps::{Op, apply, undo};

use super::World;

impl World {
    /// Crashes after each operation and right at the beginning of the next; all of it is done again, or undone to what was before.
    pub fn crash_everywhere(&self) {
        let before = self.snapshot();
        let all = || Op::SWITCH.into_iter().chain(Op::CLEAN);
        for live in [true, false] {
            let site = self.site(live);
            for (done, last) in all().enumerate() {
                let mut journal = self.captured(live);
                for op in all().take(done + 1) {
                    self.inside(|| apply(&mut journal, &site, op).unwrap());
                }
                // A crash before "done" was noted: all of it may have happened, and it must happen again or be undone.
                journal.note(last, Progress::Begun).unwrap();
                drop(journal);
                let mut journal = Journal::open(&self.path("journal"), "n1").unwrap();
                self.inside(|| apply(&mut journal, &site, last).unwrap());
                journal.note(last, Progress::Begun).unwrap();
                if let Some(next) = all().nth(done + 1) {
                    // A crash right after "begun" was noted: nothing of it may have happened.
                    journal.note(next, Progress::Begun).unwrap();
                }
                self.inside(|| undo(&mut journal, &site).unwrap());
                self.assert_same(&before, &format!("undo after {}", last.as_str()));
                // An undo that was cut short is repeated.
                for op in all().take(done + 1) {
                    journal.note(op, Progress::Begun).unwrap();
                }
                self.inside(|| undo(&mut journal, &site).unwrap());
                self.assert_same(&before, &format!("second undo after {}", last.as_str()));
                std::fs::remove_dir_all(self.path("journal")).unwrap();
            }
        }
    }
}
