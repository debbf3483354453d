//! The test bed's networks: a switch with the nodes' gateway, and a host outside behind it.

use std::{fs, net::Ipv4Addr};

use anyhow::{Context, Result};

use super::layout::Plan;
use crate::run::{self, command};

/// Makes the switch and the host outside.
pub fn create(plan: &Plan) -> Result<()> {
    let switch = plan.netns("switch");
    let outside = plan.netns("outside");
    add_namespace(&switch)?;
    add_namespace(&outside)?;
    ip(&switch, "link add br0 type bridge")?;
    // A bridge that waits for spanning tree would swallow the first seconds of every node.
    ip(&switch, "link set br0 type bridge forward_delay 0")?;
    ip(&switch, &format!("addr add {}/24 dev br0", plan.gateway()))?;
    ip(&switch, &format!("addr add {}/64 dev br0 nodad", plan.beside(plan.gateway())))?;
    ip(&switch, "link set br0 up")?;
    sysctl(&switch, "net.ipv4.ip_forward", "1")?;
    sysctl(&switch, "net.ipv6.conf.all.forwarding", "1")?;
    // The gateway only routes: the machine's packet filter for bridges must not see what crosses the switch.
    sysctl(&switch, "net.bridge.bridge-nf-call-iptables", "0")?;
    ip(&switch, &format!("link add outside type veth peer name eth0 netns {outside}"))?;
    ip(&switch, &format!("addr add {}/24 dev outside", plan.outside_gateway()))?;
    ip(&switch, &format!("addr add {}/64 dev outside nodad", plan.beside(plan.outside_gateway())))?;
    ip(&switch, "link set outside up")?;
    ip(&outside, &format!("addr add {}/24 dev eth0", plan.outside()))?;
    ip(&outside, &format!("addr add {}/64 dev eth0 nodad", plan.beside(plan.outside())))?;
    ip(&outside, "link set eth0 up")?;
    ip(&outside, &format!("route add default via {}", plan.outside_gateway()))?;
    ip(&outside, &format!("route add default via {}", plan.beside(plan.outside_gateway())))
}

/// Connects a new namespace `part` to the switch under `address`.
pub fn connect(plan: &Plan, part: &str, address: Ipv4Addr) -> Result<()> {
    let switch = plan.netns("switch");
    let namespace = plan.netns(part);
    add_namespace(&namespace)?;
    let [.., number] = address.octets();
    let cable = format!("port{number}");
    // A namespace that is gone by name lives on while somebody has a socket in it, and its cable with it.
    let _ = ip(&switch, &format!("link delete {cable}"));
    ip(&switch, &format!("link add {cable} type veth peer name eth0 netns {namespace}"))?;
    ip(&switch, &format!("link set {cable} master br0 up"))?;
    ip(&namespace, &format!("addr add {address}/24 dev eth0"))?;
    ip(&namespace, &format!("addr add {}/64 dev eth0 nodad", plan.beside(address)))?;
    ip(&namespace, "link set eth0 up")?;
    ip(&namespace, &format!("route add default via {}", plan.gateway()))?;
    ip(&namespace, &format!("route add default via {}", plan.beside(plan.gateway())))
}

/// Removes the namespace `part`; gone already is fine.
pub fn disconnect(plan: &Plan, part: &str) -> Result<()> {
    let namespace = plan.netns(part);
    if plan.netns_path(part).exists() {
        run::output(&mut command("ip", &["netns", "delete", &namespace]))?;
    }
    Ok(())
}

/// Removes every namespace of the test bed.
pub fn remove(plan: &Plan) -> Result<()> {
    for name in parts(plan)? {
        disconnect(plan, &name)?;
    }
    Ok(())
}

/// The parts that have a namespace.
pub fn parts(plan: &Plan) -> Result<Vec<String>> {
    let prefix = plan.netns_prefix();
    let Ok(entries) = fs::read_dir("/run/netns") else { return Ok(Vec::new()) };
    let mut parts = Vec::new();
    for entry in entries {
        if let Some(part) = entry?.file_name().to_string_lossy().strip_prefix(&prefix) {
            parts.push(part.to_owned());
        }
    }
    Ok(parts)
}

/// Sets a sysctl of the namespace.
pub fn sysctl(namespace: &str, name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    let script = format!("echo {value} > {path}");
    run::output(&mut command("ip", &["netns", "exec", namespace, "sh", "-c", &script])).map(drop)
}

fn add_namespace(name: &str) -> Result<()> {
    run::output(&mut command("ip", &["netns", "add", name]))?;
    ip(name, "link set lo up")
}

fn ip(namespace: &str, arguments: &str) -> Result<()> {
    let mut args = vec!["-n", namespace];
    args.extend(arguments.split(' '));
    run::output(&mut command("ip", &args)).map(drop).with_context(|| format!("in the namespace {namespace}"))
}
