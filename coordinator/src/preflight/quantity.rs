//! How much of a node's CPU and memory is free, and how much a pod asks for.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

type Amounts = BTreeMap<String, Quantity>;

/// Amounts in CPUs, bytes and pods. A resource that a node doesn't tell about is not counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Room {
    cpu: f64,
    memory: f64,
    pods: f64,
}

impl Room {
    /// What the node has for pods.
    #[must_use]
    pub fn of(node: &Node) -> Self {
        let all = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        let amount = |name: &str| all.and_then(|all| all.get(name)).and_then(value).unwrap_or(f64::INFINITY);
        Self { cpu: amount("cpu"), memory: amount("memory"), pods: amount("pods") }
    }

    /// Takes what a pod asks for.
    pub fn take(&mut self, needs: &Self) {
        self.cpu -= needs.cpu;
        self.memory -= needs.memory;
        self.pods -= needs.pods;
    }

    /// Whether there is room for it.
    #[must_use]
    pub fn holds(&self, needs: &Self) -> bool {
        needs.cpu <= self.cpu && needs.memory <= self.memory && needs.pods <= self.pods
    }
}

/// What takes room.
pub trait Takes {
    /// How much.
    fn needs(&self) -> Room;
}

impl Takes for Pod {
    fn needs(&self) -> Room {
        let containers = self.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default();
        let sum = |name: &str| {
            let requests =
                containers.iter().filter_map(|container| container.resources.as_ref()?.requests.as_ref());
            requests.filter_map(|requests: &Amounts| requests.get(name).and_then(value)).sum()
        };
        Room { cpu: sum("cpu"), memory: sum("memory"), pods: 1.0 }
    }
}

/// A quantity as a number: `100m`, `2`, `1.5Gi`, `1e3`.
fn value(quantity: &Quantity) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 13] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
    ];
    let text = quantity.0.as_str();
    let scaled = SUFFIXES.iter().find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, factor)));
    match scaled {
        Some((number, factor)) => number.parse::<f64>().ok().map(|number| number * factor),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("100m", Some(0.1))]
    #[case("2", Some(2.0))]
    #[case("1.5Gi", Some(1_610_612_736.0))]
    #[case("50M", Some(50e6))]
    #[case("1e3", Some(1000.0))]
    #[case("much", None)]
    fn quantities_are_numbers(#[case] text: &str, #[case] number: Option<f64>) {
        let read = value(&Quantity(text.to_owned()));
        assert!(match (read, number) {
            (Some(read), Some(number)) => (read - number).abs() < 1e-6,
            (read, number) => read.is_none() && number.is_none(),
        });
    }
}
