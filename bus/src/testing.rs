//! Real nats-servers for tests and the demo: on free ports of the loopback address, ended when dropped.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Environment variable that names the nats-server binary.
pub const SERVER_VARIABLE: &str = "HEARTH_NATS_SERVER";

/// Finds nats-server: `HEARTH_NATS_SERVER`, else `PATH`, else `~/.cache/hearth/tools/nats-server`.
pub fn find_nats_server() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os(SERVER_VARIABLE) {
        return Some(named.into());
    }
    let on_path = std::env::var_os("PATH")
        .into_iter()
        .flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>())
        .map(|dir| dir.join("nats-server"));
    let tools = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/hearth/tools/nats-server"));
    on_path.chain(tools).find(|candidate| candidate.is_file())
}

/// Deadline of what a test waits for: generous, for loaded machines.
pub const SOON: Duration = Duration::from_secs(60);

/// Asks `look` again until it gives something, and fails the test after [`SOON`].
///
/// # Panics
/// When the time is over: says what was waited for.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let asked = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(SOON, asked).await {
        Ok(found) => found,
        Err(_) => panic!("waited {SOON:?} for {what}"),
    }
}

/// Copies a directory and everything below it.
///
/// # Panics
/// When a file cannot be read or written.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("the target can be made");
    for entry in std::fs::read_dir(from).expect("the source can be listed") {
        let entry = entry.expect("the source can be listed");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("its kind is known").is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("a file can be copied");
        }
    }
}

/// How a test server is set up. The default is safe: every write synced, monitoring port open.
#[derive(Debug, Clone)]
pub struct ServerSetup {
    /// `sync_interval: always`.
    pub sync_always: bool,
    /// Opens a monitoring port.
    pub monitor: bool,
    /// More lines of configuration.
    pub extra: String,
}

impl Default for ServerSetup {
    fn default() -> Self {
        Self {
            sync_always: true,
            monitor: true,
            extra: String::new(),
        }
    }
}

/// A nats-server with its store in a directory; killed when dropped.
#[derive(Debug)]
pub struct NatsServer {
    dir: PathBuf,
    setup: ServerSetup,
    child: Option<Child>,
    port: u16,
    monitor_port: Option<u16>,
}

impl NatsServer {
    /// Starts a server with its configuration, store and log (`nats.log`) under `dir`, and returns once it is ready.
    ///
    /// # Panics
    /// When no nats-server is found or it does not start: says which and why.
    pub fn start(dir: &Path) -> Self {
        Self::start_with(dir, ServerSetup::default())
    }

    /// As [`NatsServer::start`], set up otherwise.
    ///
    /// # Panics
    /// As [`NatsServer::start`].
    pub fn start_with(dir: &Path, setup: ServerSetup) -> Self {
        let mut server = Self {
            dir: dir.to_owned(),
            setup,
            child: None,
            port: 0,
            monitor_port: None,
        };
        server.launch();
        server
    }

    /// Address for clients.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Address of the monitoring port.
    ///
    /// # Panics
    /// If it was set up without one.
    pub fn monitor_url(&self) -> String {
        let port = self
            .monitor_port
            .expect("this server was set up without a monitoring port");
        format!("http://127.0.0.1:{port}")
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Kills it at once (SIGKILL) and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again on the same ports and store, killing it first if it runs.
    ///
    /// # Panics
    /// As [`NatsServer::start`].
    pub fn restart(&mut self) {
        self.kill();
        self.launch();
    }

    fn launch(&mut self) {
        let binary = find_nats_server().unwrap_or_else(|| {
            panic!(
                "no nats-server: set {SERVER_VARIABLE}, put it on PATH, or run `cargo xtask setup`, which fetches it"
            )
        });
        let config = self.dir.join("nats.conf");
        std::fs::create_dir_all(&self.dir).expect("the directory of a test server can be made");
        std::fs::write(&config, self.config()).expect("the configuration of a test server can be written");
        let mut child = Command::new(&binary)
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}", binary.display()));
        let stderr = child.stderr.take().expect("stderr is piped");
        let (lines, rest) = std::sync::mpsc::channel();
        let log = self.dir.join("nats.log");
        std::thread::spawn(move || {
            use std::io::Write;
            let mut log = std::fs::OpenOptions::new().create(true).append(true).open(log).ok();
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some(log) = &mut log {
                    let _ = writeln!(log, "{line}");
                }
                let _ = lines.send(line);
            }
        });
        self.child = Some(child);
        let mut said = String::new();
        for line in rest.iter() {
            if let Some(port) = port_after(&line, "Listening for client connections on ") {
                self.port = port;
            }
            if let Some(port) = port_after(&line, "Starting http monitor on ") {
                self.monitor_port = Some(port);
            }
            if line.contains("Server is ready") {
                return;
            }
            let _ = writeln!(said, "{line}");
        }
        self.kill();
        panic!("nats-server did not start:\n{said}");
    }

    fn config(&self) -> String {
        let port = |known: Option<u16>| known.map_or("-1".to_owned(), |p| p.to_string());
        let mut text = format!(
            "listen: \"127.0.0.1:{}\"\nserver_name: \"test-{}\"\n",
            port((self.port != 0).then_some(self.port)),
            std::process::id()
        );
        if self.setup.monitor {
            let _ = writeln!(text, "http: \"127.0.0.1:{}\"", port(self.monitor_port));
        }
        let sync = if self.setup.sync_always {
            "\n  sync_interval: always"
        } else {
            ""
        };
        let _ = writeln!(text, "jetstream {{\n  store_dir: {:?}{sync}\n}}", self.dir.join("js"));
        text.push_str(&self.setup.extra);
        text
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn port_after(line: &str, words: &str) -> Option<u16> {
    let (_, address) = line.split_once(words)?;
    address.trim().rsplit_once(':')?.1.parse().ok()
}
