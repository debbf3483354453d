//! The parts of a real cluster, built from the Go modules pinned in `tests/parts`.
//!
//! A stack is a Go module that only names what it builds (`tool` lines) with go.mod and go.sum. Built once into
//! the cache, program by program, so that an interrupted build goes on where it was. The stock manifests are
//! taken from the modules in the same go, so that later runs need neither sources nor network.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{cache, requirements, run, say::Progress};

/// Kubernetes' version, as in `tests/parts/kubernetes/go.mod`.
pub const KUBERNETES: &str = "v1.34.4";

struct Program {
    /// The file's name in the cache.
    name: &'static str,
    /// The Go package that is built.
    package: &'static str,
}

struct Stack {
    name: &'static str,
    go_mod: &'static str,
    go_sum: &'static str,
    /// flannel's udp backend needs cgo; everything else is static without.
    cgo: bool,
    linker_flags: &'static str,
    programs: &'static [Program],
    /// Module and files in it that are kept, by their last path component under `manifests/<stack>/`.
    manifests: Option<(&'static str, &'static [&'static str])>,
}

macro_rules! stack_files {
    ($name:literal) => {
        (
            include_str!(concat!("../parts/", $name, "/go.mod")),
            include_str!(concat!("../parts/", $name, "/go.sum")),
        )
    };
}

const fn program(name: &'static str, package: &'static str) -> Program {
    Program { name, package }
}

const STACKS: &[Stack] = &[
    Stack {
        name: "kubernetes",
        go_mod: stack_files!("kubernetes").0,
        go_sum: stack_files!("kubernetes").1,
        cgo: false,
        linker_flags: "-s -w -X k8s.io/component-base/version.gitVersion=v1.34.4 \
                       -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=34",
        programs: &[
            program("etcd", "go.etcd.io/etcd/server/v3"),
            program("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            program("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
            program("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
            program("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
            program("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
            program("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        ],
        manifests: None,
    },
    Stack {
        name: "calico",
        go_mod: stack_files!("calico").0,
        go_sum: stack_files!("calico").1,
        cgo: false,
        linker_flags: "-s -w",
        programs: &[
            program("calico-node", "github.com/projectcalico/calico/node/cmd/calico-node"),
            program("calico", "github.com/projectcalico/calico/cni-plugin/cmd/calico"),
            program("install", "github.com/projectcalico/calico/cni-plugin/cmd/install"),
            program(
                "kube-controllers",
                "github.com/projectcalico/calico/kube-controllers/cmd/kube-controllers",
            ),
            program("check-status", "github.com/projectcalico/calico/kube-controllers/cmd/check-status"),
            program("calicoctl", "github.com/projectcalico/calico/calicoctl/calicoctl"),
        ],
        manifests: Some((
            "github.com/projectcalico/calico",
            &[
                "manifests/flannel-migration/calico.yaml",
                "manifests/flannel-migration/migration-job.yaml",
                "manifests/canal.yaml",
                "manifests/calico-vxlan.yaml",
            ],
        )),
    },
    Stack {
        name: "flannel",
        go_mod: stack_files!("flannel").0,
        go_sum: stack_files!("flannel").1,
        cgo: true,
        linker_flags: "-s -w -extldflags \"-static\"",
        programs: &[
            program("flanneld", "github.com/flannel-io/flannel"),
            program("install-conf", "github.com/flannel-io/flannel/cmd/install_conf"),
        ],
        manifests: Some(("github.com/flannel-io/flannel", &["Documentation/kube-flannel.yml"])),
    },
    Stack {
        name: "cni",
        go_mod: stack_files!("cni").0,
        go_sum: stack_files!("cni").1,
        cgo: false,
        linker_flags: "-s -w",
        programs: &[
            program("bandwidth", "github.com/containernetworking/plugins/plugins/meta/bandwidth"),
            program("bridge", "github.com/containernetworking/plugins/plugins/main/bridge"),
            program("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
            program("loopback", "github.com/containernetworking/plugins/plugins/main/loopback"),
            program("portmap", "github.com/containernetworking/plugins/plugins/meta/portmap"),
            program("tuning", "github.com/containernetworking/plugins/plugins/meta/tuning"),
        ],
        manifests: None,
    },
    Stack {
        name: "flannel-cni",
        go_mod: stack_files!("flannel-cni").0,
        go_sum: stack_files!("flannel-cni").1,
        cgo: false,
        linker_flags: "-s -w",
        programs: &[program("flannel", "github.com/containernetworking/plugins/plugins/meta/flannel")],
        manifests: None,
    },
];

/// Everything that was built, one directory per stack.
#[derive(Debug, Clone)]
pub struct Parts {
    stacks: Vec<(&'static str, PathBuf)>,
}

impl Parts {
    /// The program `name` of `stack`.
    pub fn program(&self, stack: &str, name: &str) -> Result<PathBuf> {
        let path = self.stack(stack)?.join("bin").join(name);
        ensure!(path.is_file(), "no program {name} in the stack {stack}");
        Ok(path)
    }

    /// The text of the stock manifest `name` of `stack`.
    pub fn manifest(&self, stack: &str, name: &str) -> Result<String> {
        let path = self.stack(stack)?.join("manifests").join(name);
        fs::read_to_string(&path).with_context(|| format!("can't read the stock manifest {}", path.display()))
    }

    /// What the cached directories are made of: changes when anything that was built changes.
    #[must_use]
    pub fn key(&self) -> String {
        let names: Vec<String> = self.stacks.iter().map(|(_, path)| path.display().to_string()).collect();
        cache::key(names.iter().map(String::as_bytes))
    }

    fn stack(&self, name: &str) -> Result<&Path> {
        self.stacks
            .iter()
            .find(|(stack, _)| *stack == name)
            .map(|(_, path)| path.as_path())
            .with_context(|| format!("no stack {name}"))
    }
}

/// Builds what isn't in the cache yet.
pub fn build() -> Result<Parts> {
    let missing: usize =
        STACKS.iter().filter(|stack| !is_built(stack)).map(|stack| stack.programs.len()).sum();
    let mut progress = Progress::new("parts", missing);
    let stacks = STACKS
        .iter()
        .map(|stack| {
            let path =
                cache::entry(&kind(stack), &key(stack), |directory| stack.build(directory, &mut progress))?;
            Ok((stack.name, path))
        })
        .collect::<Result<Vec<_>>>()?;
    if missing > 0 {
        progress.done("all built");
    }
    Ok(Parts { stacks })
}

fn kind(stack: &Stack) -> String {
    format!("parts-{}", stack.name)
}

fn key(stack: &Stack) -> String {
    let recipe: Vec<&str> =
        stack.programs.iter().flat_map(|program| [program.name, program.package]).collect();
    let recipe = recipe.join("\n");
    let manifests = stack.manifests.map(|(_, files)| files.join("\n")).unwrap_or_default();
    let inputs = [stack.go_mod, stack.go_sum, stack.linker_flags, &recipe, &manifests];
    cache::key(inputs.iter().map(|input| input.as_bytes()))
}

fn is_built(stack: &Stack) -> bool {
    cache::root().join(format!("{}-{}", kind(stack), key(stack))).is_dir()
}

impl Stack {
    fn build(&self, directory: &Path, progress: &mut Progress) -> Result<()> {
        let source = directory.join("source");
        let bin = directory.join("bin");
        fs::create_dir_all(&source)?;
        fs::create_dir_all(&bin)?;
        fs::write(source.join("go.mod"), self.go_mod)?;
        fs::write(source.join("go.sum"), self.go_sum)?;
        for program in self.programs {
            progress.step(&format!("building {} ({})", program.name, self.name));
            let path = bin.join(program.name);
            if path.is_file() {
                continue;
            }
            let unfinished = bin.join(format!(".{}", program.name));
            run::output(self.go(&source)?.arg("-o").arg(&unfinished).arg(program.package))?;
            fs::rename(&unfinished, &path)?;
        }
        if let Some((module, files)) = self.manifests {
            let manifests = directory.join("manifests");
            fs::create_dir_all(&manifests)?;
            let module = module_directory(&source, module)?;
            for file in files {
                let name = Path::new(file).file_name().context("a manifest without a name")?;
                fs::copy(module.join(file), manifests.join(name)).with_context(|| format!("no {file}"))?;
            }
        }
        Ok(())
    }

    fn go(&self, source: &Path) -> Result<Command> {
        let mut go = Command::new(requirements::go()?);
        go.current_dir(source).env("CGO_ENABLED", if self.cgo { "1" } else { "0" });
        go.args(["build", "-mod=readonly", "-trimpath", "-ldflags", self.linker_flags]);
        if self.cgo {
            go.args(["-tags", "netgo,osusergo"]);
        }
        Ok(go)
    }
}

/// Where Go keeps the module, which it fetches if it has to.
fn module_directory(source: &Path, module: &str) -> Result<PathBuf> {
    let mut download = Command::new(requirements::go()?);
    download.current_dir(source).args(["mod", "download", "-json", module]);
    let told: serde_json::Value = serde_json::from_str(&run::output(&mut download)?)?;
    let directory = told.get("Dir").and_then(serde_json::Value::as_str);
    directory.map(PathBuf::from).with_context(|| format!("Go has no module {module}"))
}

/// The text of a stack's stock manifest, without building its programs: what only reads manifests needs none of them.
pub fn stock_manifest(stack: &str, name: &str) -> Result<String> {
    let stack =
        STACKS.iter().find(|known| known.name == stack).with_context(|| format!("no stack {stack}"))?;
    let path = if is_built(stack) {
        cache::root().join(format!("{}-{}", kind(stack), key(stack))).join("manifests").join(name)
    } else {
        let source = tempfile::tempdir()?;
        fs::write(source.path().join("go.mod"), stack.go_mod)?;
        fs::write(source.path().join("go.sum"), stack.go_sum)?;
        let (module, files) = stack.manifests.with_context(|| format!("no manifests of {}", stack.name))?;
        let file = files.iter().find(|file| Path::new(file).file_name().is_some_and(|last| last == name));
        module_directory(source.path(), module)?.join(file.with_context(|| format!("no manifest {name}"))?)
    };
    fs::read_to_string(&path).with_context(|| format!("can't read the stock manifest {}", path.display()))
}

/// The variable that names a folder with archives of other versions' sources and manifests (`calico*.tar.xz`).
pub const SOURCES: &str = "PARTS_SOURCES";

/// Unpacks the YAML files of the archives of Calico that somebody has laid ready, each archive into a directory of its own below
/// `directory`; `None` without [`SOURCES`].
pub fn unpack_calicos(directory: &Path) -> Result<Option<Vec<PathBuf>>> {
    let Some(sources) = std::env::var_os(SOURCES).filter(|value| !value.is_empty()) else { return Ok(None) };
    let sources = PathBuf::from(sources);
    let mut archives = Vec::new();
    for entry in fs::read_dir(&sources).with_context(|| format!("{SOURCES}={}", sources.display()))? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("calico") && name.ends_with(".tar.xz") {
            let target = directory.join(name.trim_end_matches(".tar.xz"));
            fs::create_dir_all(&target)?;
            let mut tar = Command::new("tar");
            tar.arg("-xJf").arg(&path).arg("-C").arg(&target).args(["--wildcards", "*.yaml"]);
            run::output(&mut tar)?;
            archives.push(target);
        }
    }
    ensure!(!archives.is_empty(), "{SOURCES}={}: no calico*.tar.xz is there", sources.display());
    archives.sort();
    Ok(Some(archives))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stack_names_its_programs_as_tools_and_pins_its_modules() {
        for stack in STACKS {
            for program in stack.programs {
                assert!(stack.go_mod.contains(program.package), "{}: {}", stack.name, program.package);
            }
            assert!(stack.go_sum.lines().count() > 50, "{}", stack.name);
        }
    }

    #[test]
    fn the_version_that_kubernetes_reports_is_the_one_that_is_pinned() {
        let kubernetes = &STACKS[0];
        assert!(kubernetes.go_mod.contains(&format!("k8s.io/kubernetes {KUBERNETES}")));
        assert!(kubernetes.linker_flags.contains(&format!("gitVersion={KUBERNETES} ")));
    }
}
