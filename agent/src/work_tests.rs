use rstest::rstest;

use super::*;
use crate::journal::Progress;

fn site(directory: &Path) -> Site {
    Site {
        node: "n".into(),
        results: directory.join("results"),
        cni_state: directory.join("cni"),
        flannel_run: directory.join("run"),
        rename_live: true,
    }
}

fn journal(directory: &Path, state: State, progress: &[(Op, Progress)]) -> Journal {
    let mut journal = Journal::open(&directory.join("journal"), "n").unwrap();
    journal.entry.boot = "an earlier one".into();
    journal.entry.state = state;
    journal.entry.progress = progress.to_vec();
    let config = cni::Config {
        path: directory.join("10-flannel.conflist"),
        mode: 0o644,
        text: "flannel's".into(),
        network: "cbr0".into(),
        plugins: vec!["flannel".into()],
    };
    journal.entry.captured = Some(Captured {
        configs: vec![config],
        calico_path: directory.join("10-calico.conflist"),
        ..Captured::default()
    });
    journal.write().unwrap();
    journal
}

#[rstest]
#[case::preparing(State::Preparing, &[], State::Flannel, "Rebooted")]
#[case::prepared(State::Prepared, &[], State::Flannel, "Rebooted")]
#[case::before_any_change(State::Switching, &[], State::Flannel, "Rebooted")]
#[case::in_mid_switch(State::Switching, &[(Op::SwapConfig, Progress::Done), (Op::RenameDevice, Progress::Begun)], State::Flannel, "Rebooted")]
#[case::verifying(State::Verifying, &[(Op::SwapConfig, Progress::Done), (Op::MovePods, Progress::Done)], State::Verifying, "NotStarted")]
#[case::reverting(State::Reverting, &[(Op::SwapConfig, Progress::Done)], State::Reverting, "NotStarted")]
#[case::calico(State::Calico, &[(Op::SwapConfig, Progress::Done)], State::Calico, "NotStarted")]
fn after_a_reboot(
    #[case] before: State,
    #[case] progress: &[(Op, Progress)],
    #[case] after: State,
    #[case] reason: &str,
) {
    let directory = tempfile::tempdir().unwrap();
    let mut journal = journal(directory.path(), before, progress);
    std::fs::write(directory.path().join("10-calico.conflist"), "Calico's").unwrap();
    after_boot(&mut journal, &site(directory.path())).unwrap();
    assert_eq!((journal.entry.state, journal.entry.reason.as_str()), (after, reason));
    // What another lease finds is captured anew; nothing of the old links is undone or gone on with.
    assert_eq!(journal.entry.captured.is_none(), after == State::Flannel);
    let kept = [Op::SwapConfig, Op::RemoveFiles];
    assert!(journal.entry.progress.iter().all(|(op, _)| kept.contains(op)), "{:?}", journal.entry.progress);
    let flannels = directory.path().join("10-flannel.conflist").exists();
    assert_eq!(flannels, before == State::Switching && !progress.is_empty());
    let same = journal.clone();
    after_boot(&mut journal, &site(directory.path())).unwrap();
    assert_eq!(journal, same, "a second look finds the same boot");
}
