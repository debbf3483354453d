//! The switch alone, by the number of pods: real devices in namespaces, the agent's own operations, nothing else.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use flannel_migration_agent::steps::{Op, apply_before, undo};
use serde::{Deserialize, Serialize};

// The agent's tests have the node that is needed; what is measured is what is tested.
#[path = "../../../agent/tests/world/mod.rs"]
mod world;

/// What one switch took.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Pods on the node.
    pub pods: u8,
    /// Milliseconds of the whole switch.
    pub total: f64,
    /// Milliseconds of each operation, in order.
    pub operations: Vec<(String, f64)>,
    /// Milliseconds of the way back.
    pub undo: f64,
}

/// So many times there and back, with each number of pods.
pub fn run(pods: &[u8], times: u32) -> Result<()> {
    let mut all = Vec::new();
    for &pods in pods {
        let world = world::World::new(pods);
        let mut journal = world.captured(true);
        let site = world.site(true);
        for _ in 0..times {
            let began = Instant::now();
            let operations = world.inside(|| {
                let next = Op::SWITCH.into_iter().skip(1).map(Some).chain([None]);
                Op::SWITCH
                    .into_iter()
                    .zip(next)
                    .map(|(op, next)| {
                        let began = Instant::now();
                        apply_before(&mut journal, &site, op, next)
                            .with_context(|| format!("{} fails", op.as_str()))?;
                        Ok((op.as_str().to_owned(), milliseconds(began.elapsed())))
                    })
                    .collect::<Result<Vec<_>>>()
            })?;
            let total = milliseconds(began.elapsed());
            let began = Instant::now();
            world
                .inside(|| undo(&mut journal, &site))
                .map_err(|failed| anyhow!("the switch can't be undone: {failed:?}"))?;
            let undo = milliseconds(began.elapsed());
            eprintln!("bench: {pods} pods: switch {total:.1} ms, undo {undo:.1} ms");
            all.push(Figures { pods, total, operations, undo });
        }
    }
    super::keep("switch", &all)
}

fn milliseconds(span: Duration) -> f64 {
    span.as_secs_f64() * 1000.0
}
