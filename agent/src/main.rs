//! The agent's program.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Parser as _;
use flannel_migration_agent::agent::Agent;
use flannel_migration_agent::alone;
use flannel_migration_agent::args::Args;
use flannel_migration_agent::metrics::{self, Metrics};
use flannel_migration_agent::names::IDENTIFIER;
use flannel_migration_telemetry::{Probes, log, serve};
use futures::StreamExt as _;
use prometheus_client::registry::Registry;
use signal_hook::consts::{SIGINT, SIGTERM, TERM_SIGNALS};
use tokio_util::sync::CancellationToken;

/// The loop turns every few seconds, and no step takes longer than this: else the agent hangs. Its journal makes a restart safe.
const SILENCE: Duration = Duration::from_mins(5);

fn main() -> ExitCode {
    let args = Args::parse();
    let logging = log::start(&args.log, args.log_format, Some(IDENTIFIER)).map_err(anyhow::Error::from);
    match logging.and_then(|()| run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("{error:#}");
            tracing::error!(error = text, "the agent can't go on");
            if error.is::<log::Error>() {
                // Nothing logs then.
                let _ = writeln!(std::io::stderr(), "{text}");
            }
            // Where the kubelet looks for the reason; absent outside a pod.
            drop(std::fs::write("/dev/termination-log", &text));
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    // The second signal ends the process even if the runtime hangs; the journal makes that safe. This must be
    // registered before the first signal's flag.
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked))?;
        signal_hook::flag::register(signal, Arc::clone(&asked))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut signals = signal_hook_tokio::Signals::new(TERM_SIGNALS)?;
        let cancel = shutdown.clone();
        tokio::spawn(async move {
            signals.next().await;
            cancel.cancel();
        });
        let Some(_alone) = alone::wait(alone::NAME, &shutdown).await? else { return Ok(()) };
        let mut registry = Registry::with_prefix(metrics::PREFIX);
        let metrics = Metrics::registered(&mut registry);
        let probes = Probes::new(SILENCE);
        let admin = tokio::spawn(serve(args.admin_address, registry, probes.clone()));
        let agent = Agent::new(args, metrics, probes).await?;
        let result = Box::pin(agent.run(shutdown)).await;
        admin.abort();
        result
    })
}
