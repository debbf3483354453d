//! A newcomer's walk: the commands of README.md, one after another, on a real cluster, print what README.md shows.
//!
//! Needs root and brings a real cluster up.

#![allow(clippy::panic, clippy::unwrap_used, reason = "all of it is tests")]

use std::{fmt::Write as _, fs, os::unix::fs::symlink, path::Path, process::Command, time::Duration};

use flannel_migration_tests::{
    bed::Bed,
    images,
    migration::checks,
    run,
    scratch::Scratch,
    shape::{NodeShape, Shape},
};

/// One command and what it prints; a line `...` stands for any lines.
#[derive(Debug)]
struct Step {
    command: String,
    prints: Vec<String>,
}

/// The steps of the manual: lines that begin with `    $ `, each with the indented lines after it.
fn steps(manual: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut inside = false;
    for line in manual.lines() {
        match (line.strip_prefix("    $ "), line.strip_prefix("    ")) {
            (Some(command), _) => {
                // What follows a hash is for the reader.
                let command = command.split("  #").next().unwrap_or_default().trim().to_owned();
                steps.push(Step { command, prints: Vec::new() });
                inside = true;
            }
            (None, Some(output)) if inside => steps.last_mut().unwrap().prints.push(output.to_owned()),
            // Within what is printed, or its end.
            (None, None) if inside && line.is_empty() => steps.last_mut().unwrap().prints.push(String::new()),
            _ => inside = false,
        }
    }
    for step in &mut steps {
        while step.prints.last().is_some_and(String::is_empty) {
            step.prints.pop();
        }
    }
    steps
}

/// Without what differs from run to run: numbers, the random part of a pod's name, the width of columns.
fn normal(line: &str) -> String {
    let words = line.split_whitespace().map(|word| {
        let mut text = String::new();
        for letter in word.chars() {
            match letter {
                '0'..='9' if text.ends_with('0') => {}
                '0'..='9' => text.push('0'),
                other => text.push(other),
            }
        }
        // Ages: seconds, or minutes and seconds.
        if text == "0m0s" { "0s".to_owned() } else { text }
    });
    words.collect::<Vec<_>>().join(" ")
}

fn matches(expected: &[String], printed: &[&str]) -> bool {
    match expected.split_first() {
        None => printed.is_empty(),
        Some((line, rest)) if line == "..." => {
            (0..=printed.len()).any(|skipped| printed.get(skipped..).is_some_and(|left| matches(rest, left)))
        }
        Some((line, rest)) => printed
            .split_first()
            .is_some_and(|(first, left)| normal(line) == normal(first) && matches(rest, left)),
    }
}

/// A directory as the reader has it: the checkout, Calico's manifest, and the plugin on the PATH.
fn desk(bed: &Bed) -> tempfile::TempDir {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let desk = tempfile::tempdir().unwrap();
    fs::write(desk.path().join("calico.yaml"), bed.parts.manifest("calico", "calico.yaml").unwrap()).unwrap();
    for name in ["manifests", "overlays"] {
        symlink(source.join(name), desk.path().join(name)).unwrap();
    }
    let programs = desk.path().join("bin");
    fs::create_dir(&programs).unwrap();
    symlink(bed.program("kubectl").unwrap(), programs.join("kubectl")).unwrap();
    let product = images::product(&bed.images.base).unwrap();
    let coordinator = product.coordinator.parent().unwrap().join("bin/coordinator");
    symlink(coordinator, programs.join("kubectl-flannel_migration")).unwrap();
    desk
}

#[test]
fn the_commands_of_the_manual_print_what_the_manual_shows() {
    let manual = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let steps = steps(&manual);
    assert!(steps.len() > 5, "{steps:?}");
    let shape = Shape { nodes: NodeShape::numbered(2), ..Shape::default() };
    let scratch = Scratch::up("m-walk", shape, env!("CARGO_BIN_EXE_testbed")).unwrap();
    let bed = &scratch.bed;
    bed.load_project_images().unwrap();
    let desk = desk(bed);
    let path = format!("{}:{}", desk.path().join("bin").display(), std::env::var("PATH").unwrap());
    let (mut told, mut wrong) = (String::new(), Vec::new());
    for step in &steps {
        let mut shell = Command::new("timeout");
        shell.args(["180", "sh", "-c", &step.command]).current_dir(desk.path());
        let output = shell.env("PATH", &path).env("KUBECONFIG", bed.plan.kubeconfig()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let _ = writeln!(told, "    $ {}", step.command);
        for line in text.lines() {
            let _ = writeln!(told, "    {line}");
        }
        told += &String::from_utf8_lossy(&output.stderr);
        let printed: Vec<&str> = text.lines().collect();
        if !output.status.success() || !matches(&step.prints, &printed) {
            wrong.push(format!("{} ({})", step.command, output.status));
            if !output.status.success() {
                break;
            }
        }
    }
    eprintln!("{told}");
    assert!(wrong.is_empty(), "not as in README.md: {}\nit was:\n{told}", wrong.join("; "));
    run::wait_for("pods are Ready", Duration::from_secs(30), || Ok(checks::pods(bed)?.is_empty())).unwrap();
}

#[test]
fn numbers_and_columns_may_differ_and_words_may_not() {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let expected = lines("NAME   AGE\n...\nn1  calico  12s");
    assert!(matches(&expected, &["NAME AGE", "n1 calico 7s"]));
    assert!(matches(&expected, &["NAME AGE", "x", "y", "n1   calico 2m10s"]));
    assert!(!matches(&expected, &["NAME AGE", "n1 flannel 7s"]));
    assert!(!matches(&expected, &["NAME AGE", "n1 calico 7s", "more"]));
}
