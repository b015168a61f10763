//! The root file system of a virtual machine: an archive in memory, with a few programs and their
//! dependencies.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use super::kernels::Kernel;
use crate::packages::Private;
use crate::workspace::Workspace;

/// Modules that tests need. Those that a kernel has built in, or lacks, are skipped; tests that need the latter report
/// it.
const MODULES: [&str; 29] = [
    "veth",
    "bridge",
    "dummy",
    "macvlan",
    "ipvlan",
    "8021q",
    "sch_ingress",
    "cls_bpf",
    "cls_matchall",
    "nf_tables",
    "nft_ct",
    "nft_reject_inet",
    "nft_chain_nat",
    "nft_nat",
    "nft_redir",
    "nft_masq",
    "nft_compat",
    "xt_tcpudp",
    "xt_mark",
    "xt_connmark",
    "xt_REDIRECT",
    "iptable_filter",
    "iptable_mangle",
    "iptable_nat",
    "ip6table_filter",
    "ip6table_mangle",
    "ip6table_nat",
    "inet_diag",
    "tcp_diag",
];

/// The programs that tests run.
const PROGRAMS: [&str; 23] = [
    "ip",
    "ss",
    "bpftool",
    "unshare",
    "nft",
    "dig",
    "drill",
    "sh",
    "mount",
    "getent",
    "tc",
    "setpriv",
    "sleep",
    "iptables",
    "ip6tables",
    "iptables-restore",
    "ip6tables-restore",
    "iptables-save",
    "ip6tables-save",
    "iptables-nft",
    "ip6tables-nft",
    "iptables-legacy",
    "ip6tables-legacy",
];

/// Without certificates, a client of the API server can't be created.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Debian's directory of iptables extensions, which are loaded at run time.
const EXTENSIONS: &str = "/usr/lib/x86_64-linux-gnu/xtables";

const PLUGINS: [&str; 4] = ["bridge", "ptp", "host-local", "loopback"];

/// The first program of the machine.
const INIT: &str = r"#!/vm/busybox sh
export PATH=/usr/sbin:/usr/bin:/vm/bin HOME=/root TERM=dumb
/vm/busybox ln -s usr/bin /bin
/vm/busybox ln -s usr/sbin /sbin
/vm/busybox --install -s /vm/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in $(cat /vm/modules); do insmod /vm/lib/$module || echo module $module: failed; done
ip link set lo up
stty raw -F /dev/ttyS1
setsid sh /vm/run </dev/null >/dev/ttyS1 2>&1
echo vm-status: $? >/dev/ttyS0
sync
poweroff -f
";

/// A root directory in preparation: links, which the archive follows.
pub(super) struct Root<'a> {
    workspace: &'a Workspace,
    private: Private<'a>,
    folder: PathBuf,
}

impl<'a> Root<'a> {
    /// With the standard programs.
    pub(super) fn new(workspace: &'a Workspace, name: &str, kernel: &Kernel) -> Result<Self> {
        let folder = workspace.target(format!("vm/{name}/root"));
        let _ = fs::remove_dir_all(&folder);
        for empty in [
            "proc", "sys", "dev", "tmp", "run", "root", "etc", "usr/bin", "usr/sbin", "vm/bin", "vm/lib",
            "var/lib",
        ] {
            fs::create_dir_all(folder.join(empty))
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let root = Self { workspace, private: Private::new(workspace), folder };
        root.write("init", INIT)?;
        fs::set_permissions(root.folder.join("init"), fs::Permissions::from_mode(0o755))?;
        root.write("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")?;
        root.write("etc/group", "root:x:0:\nnogroup:x:65534:\n")?;
        root.write("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
        root.write("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")?;
        root.write("etc/resolv.conf", "")?;
        root.put(&root.find("busybox")?, Path::new("/vm/busybox"))?;
        for program in PROGRAMS {
            let path = root.find(program)?;
            root.program(&path, &Path::new("/usr/bin").join(program))?;
        }
        let plugins = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"].map(PathBuf::from);
        let plugins = plugins.into_iter().find(|folder| folder.join(PLUGINS[0]).exists());
        let plugins = plugins.context("the CNI plugins are not there: cargo xtask setup")?;
        for plugin in PLUGINS {
            root.program(&plugins.join(plugin), &Path::new("/usr/lib/cni").join(plugin))?;
        }
        root.put(Path::new(AUTHORITIES), Path::new(AUTHORITIES))?;
        for extension in fs::read_dir(EXTENSIONS).with_context(|| format!("cannot read {EXTENSIONS}"))? {
            let path = extension?.path();
            root.put(&path, &path)?;
        }
        root.modules(kernel)?;
        Ok(root)
    }

    /// A program that was built here, without debug information.
    pub(super) fn built(&self, from: &Path, to: &Path) -> Result<()> {
        let place = self.folder.join(to.strip_prefix("/").unwrap_or(to));
        fs::create_dir_all(place.parent().unwrap_or(&self.folder))?;
        let status = self.workspace.command(self.find("strip")?).arg("-o").arg(&place).arg(from).status()?;
        if !status.success() {
            bail!("strip failed for {}", from.display());
        }
        self.libraries(from)
    }

    /// A program of this machine, with its shared libraries.
    fn program(&self, from: &Path, to: &Path) -> Result<()> {
        let from = self.private.program(from).unwrap_or_else(|| from.to_owned());
        self.put(&from, to)?;
        self.libraries(&from)
    }

    fn libraries(&self, from: &Path) -> Result<()> {
        let mut ldd = self.workspace.command("ldd");
        if self.private.place(from) != from {
            ldd.env("LD_LIBRARY_PATH", env::join_paths(self.private.libraries())?);
        }
        let output = ldd.arg(from).stderr(Stdio::null()).output()?;
        for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
            self.put(&library, &self.private.place(&library))?;
        }
        Ok(())
    }

    fn find(&self, program: &str) -> Result<PathBuf> {
        self.workspace.which(program).with_context(|| format!("{program} is not there: cargo xtask setup"))
    }

    pub(super) fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.folder.join(path);
        fs::create_dir_all(path.parent().unwrap_or(&self.folder))?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// A file of this machine's.
    pub(super) fn put(&self, from: &Path, to: &Path) -> Result<()> {
        let place = self.folder.join(to.strip_prefix("/").unwrap_or(to));
        if place.exists() {
            return Ok(());
        }
        fs::create_dir_all(place.parent().unwrap_or(&self.folder))?;
        let from = from.canonicalize().with_context(|| format!("cannot find {}", from.display()))?;
        symlink(&from, &place).with_context(|| format!("cannot link {}", place.display()))
    }

    fn modules(&self, kernel: &Kernel) -> Result<()> {
        if !kernel.modules.join("lib/modules").join(&kernel.release).join("modules.dep.bin").exists() {
            let mut depmod = self.workspace.command(self.find("depmod")?);
            let status = depmod.arg("-b").arg(&kernel.modules).arg(&kernel.release).status()?;
            if !status.success() {
                bail!("depmod failed for {}", kernel.release);
            }
        }
        let (mut seen, mut order) = (BTreeSet::new(), String::new());
        for module in MODULES {
            let mut modprobe = self.workspace.command(self.find("modprobe")?);
            modprobe.arg("-d").arg(&kernel.modules).args(["-S", &kernel.release, "--show-depends", module]);
            let output = modprobe.output()?;
            for file in inserted(&String::from_utf8_lossy(&output.stdout)) {
                let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let plain = name.trim_end_matches(".xz").trim_end_matches(".zst");
                if !seen.insert(plain.to_owned()) {
                    continue;
                }
                let place = self.folder.join("vm/lib").join(plain);
                self.decompress(&file, &place)?;
                order.push_str(plain);
                order.push('\n');
            }
        }
        self.write("vm/modules", &order)
    }

    fn decompress(&self, from: &Path, to: &Path) -> Result<()> {
        let program = match from.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => "xz",
            Some("zst") => "zstd",
            _ => return symlink(from, to).with_context(|| format!("cannot link {}", to.display())),
        };
        let mut command = self.workspace.command(self.find(program)?);
        let status = command.arg("-qdc").arg(from).stdout(File::create(to)?).status()?;
        if !status.success() {
            bail!("{program} can't decompress {}", from.display());
        }
        Ok(())
    }

    /// Creates the archive.
    pub(super) fn archive(self) -> Result<Image> {
        let archive = self.folder.with_file_name("root.cpio");
        // Follows links, so that nothing has to be copied twice.
        let script = "cd \"$1\" && find . | cpio --quiet -o -H newc -L > \"$2\"";
        let mut pack = self.workspace.command("sh");
        let status = pack.args(["-c", script, "sh"]).arg(&self.folder).arg(&archive).status()?;
        if !status.success() {
            bail!("cannot pack {}", archive.display());
        }
        Ok(Image(archive))
    }
}

/// The archive, which is removed when dropped because it is large.
pub(super) struct Image(pub(super) PathBuf);

impl Drop for Image {
    fn drop(&mut self) {
        // A leftover is overwritten the next time.
        let _ = fs::remove_file(&self.0);
    }
}

/// The files in the output of ldd.
fn libraries(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    text.lines().filter_map(path).collect()
}

/// The files that `modprobe --show-depends` would insert, in order.
fn inserted(text: &str) -> Vec<PathBuf> {
    let file = |line: &str| line.strip_prefix("insmod ")?.split_whitespace().next().map(PathBuf::from);
    text.lines().filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_from_the_output_of_programs() {
        let ldd = "\tlinux-vdso.so.1 (0x0)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x1)\n\t/lib64/ld.so.2 (0x2)\n";
        assert_eq!(libraries(ldd), [Path::new("/lib/x/libc.so.6"), Path::new("/lib64/ld.so.2")]);
        let modprobe = "builtin x\ninsmod /m/llc.ko \ninsmod /m/bridge.ko.xz\n";
        assert_eq!(inserted(modprobe), [Path::new("/m/llc.ko"), Path::new("/m/bridge.ko.xz")]);
    }
}
