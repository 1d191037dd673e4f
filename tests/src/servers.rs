//! Databases with content, and clients that put load on them.

use crate::daemon::{Daemon, answered, output, until};
use crate::random::XorShift64;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// A redis that listens on a Unix socket and writes no files.
#[derive(Debug)]
pub struct Redis {
    daemon: Daemon,
    dir: TempDir,
}

impl Redis {
    /// Starts redis, and waits until it answers.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(Command::new("env"), &["--port", "0"])
    }

    /// Does the same with more options, through a command whose next argument is the program to run.
    ///
    /// # Panics
    /// As [`Redis::start`].
    #[must_use]
    pub fn start_in(mut command: Command, options: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        command.arg("redis-server").args(options);
        command.args(["--enable-debug-command", "local"]);
        command.args(["--save", "", "--appendonly", "no", "--dir"]);
        command.arg(dir.path()).arg("--unixsocket");
        let daemon = Daemon::detached(command.arg(dir.path().join("redis.sock")));
        let redis = Self { daemon, dir };
        until("redis comes up", || answered(redis.cli(&["ping"]), "PONG"));
        redis
    }

    /// Returns the process ID.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.daemon.pid()
    }

    /// Returns the process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-s").arg(self.dir.path().join("redis.sock"));
        command
    }

    /// Runs `redis-cli`, and returns the reply.
    ///
    /// # Errors
    /// Returns its standard error if it fails.
    pub fn cli(&self, words: &[&str]) -> Result<String, String> {
        // Without -e, redis-cli reports success even if redis rejects the command.
        output(self.client("redis-cli").arg("-e").args(words))
    }

    fn benchmark(&self, options: &[&str]) -> Command {
        let mut command = self.client("redis-benchmark");
        command.args(["-q", "-r", "20000"]).args(options);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Sets this many keys to 2 KiB each.
    ///
    /// # Panics
    /// If that fails.
    pub fn fill(&self, keys: u32) {
        let keys = keys.to_string();
        let options = ["-t", "set", "-n", &keys, "-d", "2048", "-P", "16"];
        let filled = self.benchmark(&options).status();
        assert!(filled.expect("it was just there").success());
    }

    /// Sets keys to a page of words each, until they fill this many MiB.
    ///
    /// # Panics
    /// If redis rejects one.
    pub fn fill_with_text(&self, mib: u32) {
        let (mut random, mut words) = (XorShift64::new(1), Vec::new());
        let mut random = || random.next_u64();
        for _ in 0..4096 {
            let letters = (0..2 + random() % 8).map(|_| char::from(b'a' + (random() % 26) as u8));
            words.push(letters.collect::<String>());
        }
        let stream = self.connect();
        let mut lines = BufReader::new(&stream);
        for key in 0..mib * 256 {
            let mut text = String::with_capacity(4000);
            while text.len() < 3900 {
                // Words have different frequencies.
                let most = 1 + random() % 4096;
                text += &words[(random() % most) as usize];
                text.push(' ');
            }
            let key = format!("text:{key}");
            let (key_len, text_len) = (key.len(), text.len());
            let set =
                format!("*3\r\n$3\r\nSET\r\n${key_len}\r\n{key}\r\n${text_len}\r\n{text}\r\n");
            (&stream).write_all(set.as_bytes()).expect("redis takes it");
            let mut answer = String::new();
            lines.read_line(&mut answer).expect("redis answers");
            assert_eq!(answer, "+OK\r\n");
        }
    }

    /// Opens a connection.
    ///
    /// # Panics
    /// If redis does not accept it.
    #[must_use]
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("redis.sock")).expect("redis listens")
    }

    /// Starts clients that read and write until they are dropped.
    #[must_use]
    pub fn load(&self) -> Daemon {
        Daemon::start(&mut self.benchmark(&["-t", "set,get,lpush", "-l", "-d", "100"]))
    }
}

/// A PostgreSQL with pgbench's tables, on a Unix socket.
#[derive(Debug)]
pub struct Postgres {
    daemon: Daemon,
    dir: TempDir,
    user: nix::unistd::User,
}

/// MiB of the database for each unit of pgbench's scale.
const MIB_OF_SCALE: u32 = 15;

/// Prefix of the names of the steady load's logs.
const LOAD_LOG: &str = "load";

const POSTGRES: &str = "/usr/lib/postgresql/15/bin";

impl Postgres {
    /// Creates a database and starts PostgreSQL in its own IPC namespace, which CRIU requires for its System V
    /// segment.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(&Command::new("env"), "", 64, 5)
    }

    /// Does the same through a command whose next argument is the program to run. PostgreSQL also listens on
    /// `address` and trusts every client there; it has this many MiB of shared buffers and pgbench's tables at
    /// this scale.
    ///
    /// # Panics
    /// As [`Postgres::start`].
    #[must_use]
    pub fn start_in(through: &Command, address: &str, shared_mib: u32, scale: u32) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        // PostgreSQL refuses to run as root.
        let user = nix::unistd::User::from_name("postgres")
            .expect("the user database can be read")
            .expect("the package makes this user; run scripts/setup");
        nix::unistd::chown(dir.path(), Some(user.uid), Some(user.gid)).expect("we are root");
        let data = dir.path().join("data");
        let initdb = client(&user, dir.path(), "initdb")
            .arg("-D")
            .arg(&data)
            .arg("-N")
            .status();
        assert!(initdb.expect("it is there: run scripts/setup").success());
        let rules = data.join("pg_hba.conf");
        let trust = fs::read_to_string(&rules).expect("initdb wrote it");
        let trust = trust + "host all all 10.0.0.0/8 trust\n";
        fs::write(&rules, trust).expect("we are root");
        let mut server = Command::new(through.get_program());
        server.args(through.get_args());
        server.args(["unshare", "--ipc", "setpriv", "--init-groups"]);
        server.arg(format!("--reuid={}", user.uid));
        server.arg(format!("--regid={}", user.gid));
        server.arg(Path::new(POSTGRES).join("postgres"));
        server.arg("-D").arg(&data).arg("-k").arg(dir.path());
        server.args(["-h", address, "-c", "fsync=off", "-c"]);
        server.arg(format!("shared_buffers={shared_mib}MB"));
        let daemon = Daemon::detached(server.current_dir("/"));
        let postgres = Self { daemon, dir, user };
        until("PostgreSQL comes up", || {
            answered(postgres.sql("select 1"), "1")
        });
        let filled = postgres
            .client("pgbench")
            .args(["-i", "-s", &scale.to_string(), "postgres"])
            .status();
        assert!(filled.expect("it is there: run scripts/setup").success());
        postgres
    }

    /// Does the same with tables that just fit into the shared buffers and are loaded into them.
    ///
    /// # Panics
    /// As [`Postgres::start`].
    #[must_use]
    pub fn start_full(through: &Command, address: &str, shared_mib: u32) -> Self {
        let scale = (shared_mib / MIB_OF_SCALE).max(1);
        let postgres = Self::start_in(through, address, shared_mib, scale);
        let all = "create extension pg_prewarm; select sum(pg_prewarm(c.oid)) from pg_class c \
                   where relname like 'pgbench%'";
        postgres.sql(all).expect("the buffers can be filled");
        postgres
    }

    /// Returns the process ID of the postmaster.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.daemon.pid()
    }

    /// Returns the postmaster.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    fn client(&self, program: &str) -> Command {
        client(&self.user, self.dir.path(), program)
    }

    /// Runs a query with `psql`, and returns the result.
    ///
    /// # Errors
    /// Returns its standard error if it fails.
    pub fn sql(&self, query: &str) -> Result<String, String> {
        let mut psql = self.client("psql");
        psql.args(["-d", "postgres", "-Atc", query]);
        output(psql.stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    /// Starts four clients that run transactions until they are dropped; returns once they do.
    #[must_use]
    pub fn load(&self) -> Daemon {
        let mut pgbench = self.client("pgbench");
        let load = Daemon::start(pgbench.args(["-n", "-c", "4", "-T", "600", "postgres"]));
        let busy = "select (select count(*) > 4 from pg_stat_activity) \
                    and (select count(*) > 100 from pgbench_history)";
        until("pgbench runs", || answered(self.sql(busy), "t"));
        load
    }

    /// Starts four clients that run this many transactions a second until they are dropped, and log them
    /// ([`Self::load_log`]).
    #[must_use]
    pub fn steady_load(&self, rate: u32) -> Daemon {
        let mut pgbench = self.client("pgbench");
        pgbench.args([
            "-n",
            "-c",
            "4",
            "-T",
            "86400",
            "-R",
            &rate.to_string(),
            "-l",
        ]);
        pgbench.arg(format!(
            "--log-prefix={}",
            self.dir.path().join(LOAD_LOG).display()
        ));
        Daemon::start(pgbench.arg("postgres"))
    }

    /// Returns pgbench's log of the steady load: a line for each transaction, flushed in blocks.
    #[must_use]
    pub fn load_log(&self) -> String {
        let files = fs::read_dir(self.dir.path())
            .into_iter()
            .flatten()
            .flatten();
        let logs = files.filter(|file| file.file_name().to_string_lossy().starts_with(LOAD_LOG));
        logs.map(|file| fs::read_to_string(file.path()).unwrap_or_default())
            .collect()
    }

    /// Asserts that pgbench's invariant holds.
    ///
    /// # Panics
    /// If it does not within 60 seconds.
    pub fn assert_balanced(&self) {
        let sums = "select (select sum(abalance) from pgbench_accounts) = \
                    (select sum(delta) from pgbench_history)";
        until("the books balance", || answered(self.sql(sums), "t"));
    }
}

fn client(user: &nix::unistd::User, dir: &Path, program: &str) -> Command {
    let mut command = Command::new(Path::new(POSTGRES).join(program));
    command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    command.current_dir("/").env("PGHOST", dir);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}
