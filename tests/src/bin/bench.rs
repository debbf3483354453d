//! `hack/bench`: measures a migration beside Calico's own controller, the coordinator in big clusters, the agent, and the images.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use flannel_migration_tests::bench::{images, report, rest, scale, sides, switch};

/// Measures, and writes docs/bench.md with its charts. The figures of each run stay in target/bench.
#[derive(Parser)]
#[command(name = "hack/bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Calico's own controller, ours with drain, ours in place, on the same kind of cluster with the same traffic.
    Sides(SidesArgs),
    /// The coordinator in big clusters of simulated nodes.
    Scale {
        /// How many nodes, several times.
        #[arg(long, value_delimiter = ',', default_value = "100,1000,5000", value_parser = clap::value_parser!(u32).range(100..=60_000))]
        nodes: Vec<u32>,
        /// How often each.
        #[arg(long, default_value_t = 3)]
        rounds: u32,
    },
    /// The agent: its switch by the number of pods, its start, and what it uses at rest.
    Agent {
        /// How many pods, several times.
        #[arg(long, value_delimiter = ',', default_value = "1,10,50,110", value_parser = clap::value_parser!(u8).range(1..=200))]
        pods: Vec<u8>,
        /// How often each.
        #[arg(long, default_value_t = 5)]
        times: u32,
        /// How long it is watched at rest, in seconds.
        #[arg(long, default_value_t = 60)]
        rest: u64,
    },
    /// The images of coordinator and agent: how large they are, as a registry holds them and unpacked.
    Images,
    /// Only write the report, of the figures that are there.
    Report,
    /// All of it.
    All,
}

#[derive(Args)]
struct SidesArgs {
    /// How often each side runs.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Number of the first round; what other rounds gave stays.
    #[arg(long, default_value_t = 1)]
    first: u32,
    /// Only these sides.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<sides::Side>,
    /// Nodes of each cluster.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// Pods on every node.
    #[arg(long)]
    pods_per_node: Option<u32>,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(action: Action) -> Result<()> {
    let testbed = testbed()?;
    match action {
        Action::Sides(args) => compare(args, &testbed)?,
        Action::Scale { nodes, rounds } => big(&nodes, rounds, &testbed)?,
        Action::Agent { pods, times, rest } => agent(&pods, times, Duration::from_secs(rest), &testbed)?,
        Action::Images => images::run()?,
        Action::Report => {}
        Action::All => {
            images::run()?;
            agent(&[1, 10, 50, 110], 5, Duration::from_mins(1), &testbed)?;
            big(&[100, 1000, 5000], 3, &testbed)?;
            let args = SidesArgs { rounds: 3, first: 1, only: Vec::new(), nodes: 3, pods_per_node: None };
            compare(args, &testbed)?;
        }
    }
    report::write()
}

fn compare(args: SidesArgs, testbed: &Path) -> Result<()> {
    let sides = if args.only.is_empty() { sides::Side::ALL.to_vec() } else { args.only };
    let plan = sides::Plan {
        rounds: args.rounds,
        first: args.first,
        sides,
        nodes: args.nodes,
        pods_per_node: args.pods_per_node,
        limit: Duration::from_mins(10),
    };
    sides::run(&plan, testbed)
}

fn big(nodes: &[u32], rounds: u32, testbed: &Path) -> Result<()> {
    (1..=rounds).try_for_each(|round| nodes.iter().try_for_each(|count| scale::run(*count, round, testbed)))
}

fn agent(pods: &[u8], times: u32, rest: Duration, testbed: &Path) -> Result<()> {
    switch::run(pods, times)?;
    rest::run(3, rest, testbed)
}

/// The test bed's program, which stands beside this one.
fn testbed() -> Result<PathBuf> {
    let path = std::env::current_exe().context("can't find myself")?.with_file_name("testbed");
    ensure!(path.is_file(), "no {}: cargo build --package flannel-migration-tests", path.display());
    Ok(path)
}
