//! Builds what a command of `hack/testbed` needs, side by side, before the test bed's own program can run.
//!
//! `parts prepare -- up --kubernetes v1.36.3` reads the command's versions and builds what the cache lacks: Go programs, the
//! Debian base, and this project's programs; commands that need no new cluster get only the last.

use std::{process::ExitCode, time::Instant};

use anyhow::{Result, bail};
use clap::Parser as _;
use flannel_migration_parts::{
    VersionArgs, Versions, build, debian, programs, requirements,
    say::{Progress, minutes},
};

/// Commands of `hack/testbed` that need a cluster's parts; the others take what is there.
const CLUSTER: &[&str] = &["up", "demo", "build"];

/// The options that choose versions, taken out of any command line.
#[derive(clap::Parser)]
#[command(no_binary_name = true)]
struct Options {
    #[command(flatten)]
    versions: VersionArgs,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((command, rest)) if command == "prepare" => prepare(rest),
        _ => Err(anyhow::anyhow!("usage: parts prepare [--] COMMAND [ARGUMENT...]")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("parts: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn prepare(command: &[String]) -> Result<()> {
    let needs_cluster = command.iter().any(|word| CLUSTER.contains(&word.as_str()));
    let asks_for_help = command.iter().any(|word| word == "--help" || word == "-h");
    if !needs_cluster || asks_for_help {
        return programs::build(programs::BED, programs::TESTBED).map(drop);
    }
    requirements::ensure()?;
    let versions = Versions::of(&Options::parse_from(versions_in(command)).versions);
    let resolved = versions.resolve()?;
    let missing = build::missing(&resolved)?;
    let base = usize::from(!debian::has_base());
    // Whether cargo has much to do can't be told beforehand; it is one step of several minutes on a new machine.
    let progress = Progress::new("parts", missing + base + 1);
    std::thread::scope(|scope| {
        let programs = scope.spawn(|| {
            let began = Instant::now();
            progress.step("compiling this project's programs");
            let built = programs::build(programs::BED, programs::TESTBED);
            progress.note(&format!("this project's programs: {}", minutes(began.elapsed())));
            built
        });
        let debian = scope.spawn(|| {
            if base > 0 {
                progress.step(&format!("installing a Debian {} base", debian::SUITE));
            }
            let began = Instant::now();
            let made = debian::base();
            if base > 0 {
                progress.note(&format!("the Debian base: {}", minutes(began.elapsed())));
            }
            made
        });
        build::build_all(&versions, resolved, &progress)?;
        for thread in [programs, debian] {
            thread.join().unwrap_or_else(|_| bail!("a build's thread ended"))?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    progress.done("all there");
    Ok(())
}

/// The words of `command` that choose versions, with their values.
fn versions_in(command: &[String]) -> Vec<String> {
    const NAMES: &[&str] = &["--kubernetes", "--calico", "--flannel", "--containerd", "--source"];
    let mut words = Vec::new();
    let mut rest = command.iter();
    while let Some(word) = rest.next() {
        if NAMES.contains(&word.as_str()) {
            words.push(word.clone());
            words.extend(rest.next().cloned());
        } else if NAMES.iter().any(|name| word.strip_prefix(name).is_some_and(|rest| rest.starts_with('='))) {
            words.push(word.clone());
        }
    }
    words
}
