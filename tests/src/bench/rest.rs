//! The agent at rest: its start, its memory, its processor time. The real program on an API server with a node that waits for its lease.

use std::{
    fs,
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    objects,
    process::{self, Usage},
};
use crate::{
    bed::{Bed, control, teardown},
    images,
    migration::{NETWORK_LABEL, STATE_LABEL},
    probe, run,
};

/// Name of the test bed.
pub const BED: &str = "b-rest";

/// What one agent used.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Milliseconds from the start of the program to its state on the Node.
    pub start: f64,
    /// Seconds that it was left alone.
    pub seconds: f64,
    /// Processor time in these seconds.
    pub cpu: f64,
    /// At the end.
    pub usage: Usage,
}

/// Starts the agent so many times, and leaves the last one alone for `rest`.
pub fn run(times: u32, rest: Duration, testbed: &Path) -> Result<()> {
    teardown::down(BED)?;
    let result = measure(times, rest, testbed);
    teardown::down(BED)?;
    super::keep("rest", &result?)
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn measure(times: u32, rest: Duration, testbed: &Path) -> Result<Vec<Figures>> {
    let program = images::shipped()?.join("agent");
    ensure!(program.is_file(), "no agent at {}", program.display());
    let bed = Bed::up_without_nodes(BED, objects::shape()?, testbed)?;
    control::stop_controllers(&bed)?;
    objects::make_nodes(&bed, 1)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let nodes: Api<Node> = Api::all(runtime.block_on(probe::client(&bed.plan.kubeconfig()))?);
    let name = objects::name(1);
    (0..times)
        .map(|number| {
            // As flannel's node, at rest, without a word of its agent yet.
            let labels = json!({ "metadata": { "labels": { NETWORK_LABEL: "flannel", STATE_LABEL: null } } });
            runtime.block_on(nodes.patch_metadata(&name, &PatchParams::default(), &Patch::Merge(labels)))?;
            let scratch = tempfile::tempdir()?;
            let began = Instant::now();
            let agent = Running(start(&bed, &program, &name, scratch.path())?);
            run::wait_for("the agent tells its state", Duration::from_secs(30), || {
                loop {
                    let told = runtime.block_on(nodes.get_metadata(&name))?;
                    if told.metadata.labels.is_some_and(|labels| labels.contains_key(STATE_LABEL)) {
                        return Ok(true);
                    }
                    if began.elapsed() > Duration::from_secs(20) {
                        return Ok(false);
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            })?;
            let start = began.elapsed().as_secs_f64() * 1000.0;
            // What follows a start is over by then.
            std::thread::sleep(Duration::from_secs(5));
            let before = process::usage(agent.0.id())?;
            let seconds = if number + 1 == times { rest } else { Duration::from_secs(1) };
            std::thread::sleep(seconds);
            let usage = process::usage(agent.0.id())?;
            let cpu = usage.cpu.saturating_sub(before.cpu).as_secs_f64();
            eprintln!(
                "bench: agent: {start:.0} ms to its first word, {} KiB resident, {cpu:.2} s of CPU in {} s",
                usage.resident >> 10,
                seconds.as_secs()
            );
            Ok(Figures { start, seconds: seconds.as_secs_f64(), cpu, usage })
        })
        .collect()
}

/// In the control plane's namespace, where no host's devices are in its way.
fn start(bed: &Bed, program: &Path, node: &str, scratch: &Path) -> Result<Child> {
    for directory in ["net.d", "cni", "run"] {
        fs::create_dir_all(scratch.join(directory))?;
    }
    process::with_bed(bed, Path::new("nsenter"))?
        .arg(format!("--net={}", bed.plan.netns_path(control::PART).display()))
        .arg(program)
        .env("KUBECONFIG", bed.plan.kubeconfig_inside("admin"))
        .env("NODE_NAME", node)
        .env("CNI_CONFIG_DIR", scratch.join("net.d"))
        .env("STATE_DIR", scratch.join("state"))
        .env("CNI_STATE_DIR", scratch.join("cni"))
        .env("FLANNEL_RUN_DIR", scratch.join("run"))
        .env("LOG_LEVEL", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("can't start the agent")
}
