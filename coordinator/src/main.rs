//! The coordinator's process: arguments in, exit status out.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};
use flannel_migration_coordinator::args::{Cli, Command, Options, Output, PLUGIN};
use flannel_migration_coordinator::cluster::Nodes;
use flannel_migration_coordinator::control::{self, Ask};
use flannel_migration_coordinator::preflight::{Finding, Severity};
use flannel_migration_coordinator::status::{show, text};
use flannel_migration_coordinator::{api, check, run};
use flannel_migration_protocol::Request;
use flannel_migration_telemetry::log;
use tracing::{error, info};

fn main() -> ExitCode {
    let cli = parse();
    let options = &cli.options;
    if let Err(error) = log::start(&options.log, options.log_format, None) {
        let why = api::chain(&error);
        // Nothing logs yet.
        let _ = writeln!(std::io::stderr(), "{why}");
        leave(&options.termination_log, &why);
        return ExitCode::from(2);
    }
    // One thread: each step is short, and with more they spend their time waking each other up.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(options, 1, &error.to_string()),
    };
    match runtime.block_on(command(&cli)) {
        Ok(code) => code,
        Err((status, why)) => fail(options, status, &why),
    }
}

/// The command line. As kubectl's plugin the program has another name, and does nothing unasked.
fn parse() -> Cli {
    let name = std::env::args_os().next().unwrap_or_default();
    let is_plugin = Path::new(&name).file_stem().is_some_and(|name| name == PLUGIN);
    let mut command = Cli::command();
    if is_plugin {
        command = command
            .name("kubectl flannel-migration")
            .bin_name("kubectl flannel-migration")
            .subcommand_required(true)
            .arg_required_else_help(true);
    }
    Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
}

async fn command(cli: &Cli) -> Result<ExitCode, (u8, String)> {
    let options = &cli.options;
    let told = |error: api::Error| (1, api::chain(&error));
    match &cli.command {
        None | Some(Command::Run) => match Box::pin(run::run(options)).await {
            Ok(()) => {
                info!("the migration is complete");
                Ok(ExitCode::SUCCESS)
            }
            Err(error) => Err((error.exit_status(), api::chain(&error))),
        },
        Some(Command::Preflight { output }) => preflight(options, *output).await.map_err(told),
        Some(Command::Pause { nodes }) => ask(options, Ask::For(Request::Pause), nodes).await.map_err(told),
        Some(Command::Resume { nodes }) => ask(options, Ask::Resume, nodes).await.map_err(told),
        Some(Command::Abort { nodes }) => ask(options, Ask::For(Request::Abort), nodes).await.map_err(told),
        Some(Command::Rollback { nodes }) => {
            ask(options, Ask::For(Request::Rollback), nodes).await.map_err(told)
        }
        Some(Command::Status { output, watch }) => {
            Box::pin(show::status(options, *output, *watch)).await.map_err(told)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn preflight(options: &Options, output: Output) -> api::Result<ExitCode> {
    let client = api::client().await?;
    let nodes = Nodes::watch(client.clone()).await?;
    let findings = check::preflight(&client, options, &nodes).await?;
    let in_the_way = findings.iter().any(|finding| finding.severity != Severity::Warning);
    let row = |finding: &Finding| {
        vec![
            finding.severity.to_string(),
            finding.reason.to_owned(),
            finding.object.clone(),
            finding.found.clone(),
            finding.remedy.clone(),
        ]
    };
    match output {
        Output::Json | Output::Yaml => print(&show::document(&findings, output)?),
        Output::Table => {
            let rows: Vec<_> = findings.iter().map(row).collect();
            if !rows.is_empty() {
                print(&text::table(&["SEVERITY", "REASON", "OBJECT", "FOUND", "REMEDY"], &rows));
            }
            if !in_the_way {
                print("nothing is in the way");
            }
        }
    }
    Ok(if in_the_way { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn ask(options: &Options, what: Ask, nodes: &[String]) -> api::Result<ExitCode> {
    let client = api::client().await?;
    for line in control::ask(&client, &options.namespace, what, nodes).await? {
        print(&line);
    }
    Ok(ExitCode::SUCCESS)
}

/// A closed pipe isn't worth a panic.
fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Leaves the reason where the kubelet takes it into the pod's status, and never exits 0.
fn fail(options: &Options, status: u8, why: &str) -> ExitCode {
    error!(status, "{why}");
    leave(&options.termination_log, why);
    ExitCode::from(status.max(1))
}

fn leave(file: &Path, why: &str) {
    if let Ok(mut file) = std::fs::OpenOptions::new().write(true).open(file) {
        // The kubelet reads the last 4096 bytes.
        let text: String = why.chars().take(1000).collect();
        let _ = file.write_all(text.as_bytes());
    }
}
