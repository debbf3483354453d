//! The test bed's own certificate authority, tokens and kubeconfigs. Worth nothing outside it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

use super::layout::{API_PORT, API_SERVICE, Plan};

/// Users of the control plane and their groups. A kubelet's user is `system:node:<name>`.
const USERS: &[(&str, &str, &str)] = &[
    ("admin", "admin", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("proxy", "system:kube-proxy", "system:node-proxier"),
];

/// Writes everything for a control plane whose nodes are `nodes`; later nodes come with [`add_node`].
pub fn write(plan: &Plan, nodes: &[String]) -> Result<()> {
    let directory = plan.secrets();
    fs::create_dir_all(&directory)?;
    let authority_key = KeyPair::generate()?;
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(DnType::CommonName, "flannel-migration test bed");
    fs::write(directory.join("ca.crt"), authority.self_signed(&authority_key)?.pem())?;
    let issuer = Issuer::new(authority, authority_key);

    let server_key = KeyPair::generate()?;
    let mut server =
        CertificateParams::new(vec!["kubernetes.default.svc".to_owned(), "localhost".to_owned()])?;
    for address in [plan.control(), API_SERVICE, Ipv4Addr::LOCALHOST] {
        server.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(address)));
    }
    fs::write(directory.join("apiserver.crt"), server.signed_by(&server_key, &issuer)?.pem())?;
    fs::write(directory.join("apiserver.key"), server_key.serialize_pem())?;

    let accounts = KeyPair::generate()?;
    fs::write(directory.join("accounts.key"), accounts.serialize_pem())?;
    fs::write(directory.join("accounts.pub"), accounts.public_key_pem())?;

    let mut tokens = String::new();
    let inside = format!("https://{}:{API_PORT}", plan.control());
    for (name, user, groups) in USERS {
        let token = token(plan, name);
        tokens.push_str(&token_line(&token, user, groups));
        fs::write(plan.kubeconfig_inside(name), kubeconfig(plan, &inside, &token)?)?;
    }
    // The API server reads its tokens at start only, so those of nodes that may come later are in it already.
    let later = (1..=crate::shape::MOST_NODES).map(|number| format!("n{number}"));
    for node in nodes.iter().cloned().chain(later.filter(|name| !nodes.contains(name))) {
        tokens.push_str(&token_line(&token(plan, &node), &format!("system:node:{node}"), "system:nodes"));
    }
    fs::write(directory.join("tokens.csv"), tokens)?;
    Ok(())
}

/// The kubeconfig of a kubelet.
pub fn add_node(plan: &Plan, node: &str) -> Result<()> {
    let inside = format!("https://{}:{API_PORT}", plan.control());
    fs::write(plan.kubeconfig_inside(node), kubeconfig(plan, &inside, &token(plan, node))?)?;
    Ok(())
}

/// The administrator's kubeconfig for the machine, where the API server is at `port` of the loopback address.
pub fn write_for_machine(plan: &Plan, port: u16) -> Result<()> {
    fs::write(
        plan.kubeconfig(),
        kubeconfig(plan, &format!("https://127.0.0.1:{port}"), &token(plan, "admin"))?,
    )?;
    Ok(())
}

fn token(plan: &Plan, name: &str) -> String {
    crate::cache::key([plan.bed.as_bytes(), name.as_bytes()])
}

fn token_line(token: &str, user: &str, groups: &str) -> String {
    format!("{token},{user},{user},\"{groups}\"\n")
}

fn kubeconfig(plan: &Plan, server: &str, token: &str) -> Result<String> {
    let ca: &Path = &plan.secrets().join("ca.crt");
    Ok(serde_json::to_string_pretty(&serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": plan.bed, "cluster": {
            "server": server,
            "certificate-authority": ca.to_str().context("the path of the certificate is no text")?,
        }}],
        "users": [{ "name": "user", "user": { "token": token }}],
        "contexts": [{ "name": plan.bed, "context": { "cluster": plan.bed, "user": "user" }}],
        "current-context": plan.bed,
    }))?)
}
