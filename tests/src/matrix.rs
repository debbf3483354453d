//! Combinations of versions and data planes, each migrated on a real cluster under traffic, and the table of how they went.

mod record;
mod scenario;

use std::path::Path;

use anyhow::Result;

pub use record::{Record, Row, write_table};
pub use scenario::{Outcome, run};

use crate::{
    parts::{VersionArgs, Versions},
    shape::{KubeProxy, Layout, NodeShape, Rules, Shape},
};

/// One row of the table.
#[derive(Debug, Clone)]
pub struct Combination {
    /// Its name on the command line and in the record.
    pub name: &'static str,
    /// The cluster.
    pub shape: Shape,
}

/// What a row of [`TABLE`] says.
struct Line {
    name: &'static str,
    kubernetes: &'static str,
    calico: &'static str,
    flannel: &'static str,
    kube_proxy: KubeProxy,
    rules: Rules,
    layout: Layout,
    dual_stack: bool,
}

/// The default, from which every line says what differs.
const DEFAULT: Line = Line {
    name: "default",
    kubernetes: "v1.37.2",
    calico: OLD,
    flannel: "v0.28.10",
    kube_proxy: KubeProxy::Iptables,
    rules: Rules::Iptables,
    layout: Layout::Current,
    dual_stack: false,
};

/// Of the Go module proxy.
const OLD: &str = "v3.28.5";
/// Of a source.
const NEW: &str = "v3.32.1";

const TABLE: &[Line] = &[
    DEFAULT,
    Line { name: "calico-new", calico: NEW, ..DEFAULT },
    Line { name: NFTABLES, calico: NEW, kube_proxy: KubeProxy::Nftables, rules: Rules::Nftables, ..DEFAULT },
    Line { name: "legacy", rules: Rules::Legacy, ..DEFAULT },
    Line { name: "legacy-calico-new", calico: NEW, rules: Rules::Legacy, ..DEFAULT },
    Line { name: "flannel-nftables", rules: Rules::Nftables, ..DEFAULT },
    Line { name: "proxy-nftables", kube_proxy: KubeProxy::Nftables, ..DEFAULT },
    Line { name: "flannel-old", flannel: "v0.26.7", ..DEFAULT },
    Line {
        name: "flannel-old-nftables",
        calico: NEW,
        flannel: "v0.26.7",
        kube_proxy: KubeProxy::Nftables,
        rules: Rules::Nftables,
        ..DEFAULT
    },
    Line { name: "canal", layout: Layout::Canal, ..DEFAULT },
    Line { name: "canal-calico-new", calico: NEW, layout: Layout::Canal, ..DEFAULT },
    Line { name: "dual-stack", dual_stack: true, ..DEFAULT },
    Line {
        name: "dual-stack-nftables",
        calico: NEW,
        kube_proxy: KubeProxy::Nftables,
        rules: Rules::Nftables,
        dual_stack: true,
        ..DEFAULT
    },
    Line { name: "older-names", layout: Layout::Older, ..DEFAULT },
    Line { name: "k8s-1.30", kubernetes: "v1.30.14", ..DEFAULT },
    Line { name: "k8s-1.33", kubernetes: "v1.33.13", ..DEFAULT },
    Line {
        name: "k8s-1.33-nftables",
        kubernetes: "v1.33.13",
        calico: NEW,
        kube_proxy: KubeProxy::Nftables,
        rules: Rules::Nftables,
        ..DEFAULT
    },
    Line { name: "k8s-1.34", kubernetes: "v1.34.4", ..DEFAULT },
    Line { name: "k8s-1.35", kubernetes: "v1.35.4", calico: NEW, ..DEFAULT },
    Line { name: "k8s-1.36", kubernetes: "v1.36.3", calico: NEW, ..DEFAULT },
];

/// The combination that everyday tests run beside the default: today's Calico, nftables throughout.
pub const NFTABLES: &str = "calico-new-nftables";

/// All combinations, in the table's order.
#[must_use]
pub fn combinations() -> Vec<Combination> {
    TABLE.iter().map(combination).collect()
}

fn combination(line: &Line) -> Combination {
    let versions = VersionArgs {
        kubernetes: Some(line.kubernetes.to_owned()),
        calico: Some(line.calico.to_owned()),
        flannel: Some(line.flannel.to_owned()),
        ..VersionArgs::default()
    };
    let shape = Shape {
        nodes: NodeShape::numbered(2),
        kube_proxy: line.kube_proxy,
        rules: line.rules,
        layout: line.layout,
        dual_stack: line.dual_stack,
        versions: Versions::of(&versions),
        ..Shape::default()
    };
    Combination { name: line.name, shape }
}

/// Runs those of `names` (all, if there are none) that the record in `docs` lacks, or all of them with `again`, and writes the
/// table after each. Goes on after a failure, which becomes a row. Returns whether every row of the whole table is good.
pub fn sweep(docs: &Path, names: &[String], again: bool, testbed: &Path) -> Result<bool> {
    let all = combinations();
    for name in names {
        let known: Vec<_> = all.iter().map(|combination| combination.name).collect();
        anyhow::ensure!(
            known.contains(&name.as_str()),
            "no combination {name:?}; there are: {}",
            known.join(" ")
        );
    }
    let mut record = Record::read(docs)?;
    let wanted: Vec<_> = all
        .iter()
        .filter(|one| names.is_empty() || names.iter().any(|name| name == one.name))
        .filter(|one| again || !record.has(one.name))
        .collect();
    for (number, combination) in wanted.iter().enumerate() {
        eprintln!("matrix: [{}/{}] {}", number + 1, wanted.len(), combination.name);
        let row = scenario::row(combination, testbed);
        eprintln!("matrix: {}: {}", combination.name, row.result);
        record.put(row);
        record.write(docs)?;
        write_table(docs, &record, &all)?;
    }
    write_table(docs, &record, &all)?;
    Ok(all.iter().all(|combination| record.is_good(combination.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_has_a_name_of_its_own_and_could_come_up() {
        let all = combinations();
        for (position, one) in all.iter().enumerate() {
            one.shape.check().unwrap();
            assert!(all.iter().skip(position + 1).all(|other| other.name != one.name), "{}", one.name);
        }
        assert!(all.iter().any(|one| one.name == NFTABLES));
        assert!(all.len() >= 14);
    }
}
